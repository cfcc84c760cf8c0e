"""Whole vision-language models as the source of an import: LLaVA-1.5's format and our own exports.

Both bring an adapter, so a run folder made of one answers at once. LLaVA's attention is `s_attn`;
any other preset starts from its weights, and what that preset adds keeps its initial values.
"""

from pathlib import Path
from typing import Any

from megatron_dattn.attention import get_preset
from megatron_dattn.conversion.families import dattn, llava
from megatron_dattn.conversion.families.key_names import KeyNames, key_names
from megatron_dattn.conversion.families.model_rules import rules_by_module
from megatron_dattn.conversion.families.weight_map import Rule
from megatron_dattn.conversion.hf_import.source import (
    EMBEDDING,
    HEAD,
    ImportSource,
    ModuleWeights,
    check_num_layers,
    check_weights,
    repeated_head,
)
from megatron_dattn.conversion.hf_import.tokenizer import special_tokens
from megatron_dattn.conversion.io.hf_folder import ConfigValues, read_json, read_model_config
from megatron_dattn.conversion.io.safetensors_reader import SafetensorsFolder
from megatron_dattn.errors import CheckpointError, ConfigError
from megatron_dattn.models.config import ModelConfig

LLAVA_ATTENTION = "s_attn"
# What the config classes take where config.json does not say it.
_IMAGE_TOKEN_IDS = {llava.MODEL_TYPE: 32000, dattn.MODEL_TYPE: 10}


def vlm_source(folder: Path, attention: str | None = None) -> ImportSource:
    """A vision-language model in one folder.

    Args:
        attention: the preset; the model's own where None.

    Raises:
        CheckpointError: another architecture, or the folder does not hold what it describes.
        ConfigError: a preset that does not fit the model.
    """
    config = read_model_config(folder)
    kind = config.get("model_type")
    if kind == llava.MODEL_TYPE:
        return _llava_source(folder, config, attention or LLAVA_ATTENTION)
    if kind == dattn.MODEL_TYPE:
        return _dattn_source(folder, config, attention)
    raise CheckpointError(
        f"{folder} holds a model of type '{kind}'; --model takes {llava.MODEL_TYPE} and "
        f"{dattn.MODEL_TYPE}; an encoder and a language model are given with --vision and "
        "--language"
    )


def image_token_id(config: dict[str, Any]) -> int:
    """The id of `<image>` in a config.json of either type, by its older or its newer name."""
    values = ConfigValues(config, "the model's config.json")
    for name in ("image_token_index", "image_token_id"):
        if config.get(name) is not None:
            return values.whole(name)
    return _IMAGE_TOKEN_IDS[config["model_type"]]


def _llava_source(folder: Path, config: dict[str, Any], attention: str) -> ImportSource:
    if get_preset(attention).visual.source == "reproject":
        raise ConfigError(
            f"attention '{attention}' has no adapter to take LLaVA's weights; choose another"
        )
    model = llava.model_from_config(config, attention)
    weights = SafetensorsFolder(folder)
    check_num_layers(_num_layers(model), weights)
    keys = key_names(weights.shapes)
    rules = llava.weight_rules(model, keys, llava.added_rows(config))
    unused = llava.unused_prefixes(model, keys)
    unused += repeated_head(weights, model.language, keys.language(HEAD), keys.language(EMBEDDING))
    return ImportSource(
        model,
        _modules(weights, rules, unused),
        {"model": folder},
        tokenizer=folder,
        image_processor=folder,
        image_token_id=image_token_id(config),
        special_tokens=special_tokens(config.get("text_config") or {}, config),
    )


def _dattn_source(folder: Path, config: dict[str, Any], attention: str | None) -> ImportSource:
    model = dattn.model_from_config(config, attention)
    weights = SafetensorsFolder(folder)
    check_num_layers(_num_layers(model), weights)
    names = KeyNames()
    unused = repeated_head(weights, model.language, names.language(HEAD), names.language(EMBEDDING))
    return ImportSource(
        model,
        _modules(weights, rules_by_module(model), unused),
        {"model": folder},
        tokenizer=folder,
        image_processor=folder,
        has_added=True,
        data=_exported_fit(folder),
        image_token_id=image_token_id(config),
        special_tokens=special_tokens(config.get("text_config") or {}, config),
    )


def _num_layers(model: ModelConfig) -> int:
    """Of the deeper half: an encoder may be stored without the layers that nobody runs."""
    return max(model.vision.num_hidden_layers, model.language.num_hidden_layers)


def _modules(
    weights: SafetensorsFolder, rules: dict[str, list[Rule]], unused: list[str]
) -> list[ModuleWeights]:
    check_weights([rule for of_module in rules.values() for rule in of_module], weights, unused)
    return [ModuleWeights(module, weights, of_module) for module, of_module in rules.items()]


def _exported_fit(folder: Path) -> dict[str, Any]:
    """How our exported processor makes squares: it can pad, cut tiles and take frames, which no
    image processor says."""
    path = folder / "processor_config.json"
    settings = read_json(path) if path.is_file() else {}
    fit = settings.get("image_fit")
    if fit not in ("resize", "pad", "crop", "anyres", None):
        raise CheckpointError(f"{path} has image_fit '{fit}', which is not known")
    names = ("image_fit", "image_grid_pinpoints", "video_frames")
    return {name: settings[name] for name in names if settings.get(name) is not None}
