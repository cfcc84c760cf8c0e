"""LLaVA-1.5 as Hugging Face stores it (`LlavaForConditionalGeneration`): config and weights.

A CLIP or SigLIP encoder, a two-layer MLP and a Llama, Mistral or Qwen decoder: our model with the
preset `s_attn` and an adapter without a norm. Both sets of names (`key_names.py`) are read.
"""

from dataclasses import replace
from typing import Any

from megatron_dattn.conversion.families.decoder import with_required
from megatron_dattn.conversion.families.key_names import KeyNames
from megatron_dattn.conversion.families.model_rules import projector_rules
from megatron_dattn.conversion.families.registry import (
    LANGUAGE,
    VISION,
    language_family,
    language_rules,
    vision_family,
    vision_rules,
)
from megatron_dattn.conversion.families.weight_map import Rule, renamed, with_more_rows
from megatron_dattn.conversion.io.hf_folder import ConfigValues
from megatron_dattn.errors import CheckpointError
from megatron_dattn.models.config import AdapterConfig, LanguageConfig, ModelConfig, VisionConfig

MODEL_TYPE = "llava"
# What LLaVA's sections are where they do not say it.
_VISION_TYPE, _TEXT_TYPE = "clip_vision_model", "llama"
ADDED_ROWS = "image_rows_added"
"""In our exports' config.json: so many rows of the vocabulary, its last, are there for `<image>`
alone and are left out again."""
# Which places of the encoder are features: all, or all but the first, a class token.
SELECT_STRATEGIES = {"clip": "default", "siglip": "full"}


def model_from_config(config: dict[str, Any], attention: str = "s_attn") -> ModelConfig:
    """Translate a config.json.

    Args:
        attention: the preset. `s_attn` is LLaVA itself; the others start from its weights.

    Raises:
        CheckpointError: another architecture, or a feature that the training stack lacks.
    """
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"the model is of type '{config.get('model_type')}'; supported: {MODEL_TYPE}"
        )
    for name, supported in (("projector_hidden_act", "gelu"), ("multimodal_projector_bias", True)):
        if config.get(name, supported) != supported:
            raise CheckpointError(f"{name} {config[name]} is not supported, only {supported}")
    return ModelConfig(
        vision=_vision_config(config),
        adapter=AdapterConfig(norm="none"),
        language=_language_config(config),
        attention=attention,
    )


def _vision_config(config: dict[str, Any]) -> VisionConfig:
    section = {"model_type": _VISION_TYPE, **_values(config).section("vision_config")}
    family = vision_family(section)
    layer = config.get("vision_feature_layer", -2)
    num_layers = _values({**family.DEFAULTS, **section}).whole("num_hidden_layers")
    if not isinstance(layer, int) or not -num_layers <= layer <= num_layers or layer == 0:
        raise CheckpointError(
            f"vision_feature_layer {layer} is not supported, only one layer's output, 1 to "
            f"{num_layers} or {-num_layers} to -1"
        )
    # Hidden state 0 is what enters the first layer.
    vision = family.vision_config(section, layer if layer < 0 else layer - num_layers - 1)
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy != SELECT_STRATEGIES[vision.family]:
        raise CheckpointError(
            f"vision_feature_select_strategy '{strategy}' is not supported with "
            f"{section['model_type']}, only '{SELECT_STRATEGIES[vision.family]}'"
        )
    return vision


def _language_config(config: dict[str, Any]) -> LanguageConfig:
    section = {"model_type": _TEXT_TYPE, **_values(config).section("text_config")}
    family = language_family(section)
    if section["model_type"] == "gemma2":
        raise CheckpointError(
            "a LLaVA with a language model of type 'gemma2' is not supported: versions of "
            "transformers differ in whether they scale its visual tokens as Gemma-2's own "
            "embeddings are; supported: llama, mistral, qwen2, qwen3"
        )
    tied = any(_values(place).flag("tie_word_embeddings") for place in (config, section))
    full = with_required(section, family.DEFAULTS)
    language = family.language_config({**full, "tie_word_embeddings": tied})
    return replace(language, vocab_size=language.vocab_size - added_rows(config))


def added_rows(config: dict[str, Any]) -> int:
    """Number of rows of embedding and head that an export has added for `<image>`.

    Raises:
        CheckpointError: it is no such number.
    """
    rows = _values(config).whole_or_none(ADDED_ROWS) or 0
    if rows < 0:
        raise CheckpointError(f"the model's config.json has {ADDED_ROWS} {rows}")
    return rows


def _values(config: dict[str, Any]) -> ConfigValues:
    return ConfigValues(config, "the model's config.json")


def weight_rules(model: ModelConfig, keys: KeyNames, rows: int = 0) -> dict[str, list[Rule]]:
    """Rules for every parameter of `vision_model`, `adapter` and `language_model`, by module.

    Positions that a preset adds to the adapter have none: they keep their initial values.

    Args:
        rows: of the vocabulary that are left out, see `added_rows`.
    """
    language = with_more_rows(language_rules(model.language), rows)
    return {
        "vision_model": renamed(vision_rules(model.vision), keys.vision),
        "adapter": renamed(projector_rules(model), keys.projector),
        "language_model": renamed(language, keys.language),
    }


def unused_prefixes(model: ModelConfig, keys: KeyNames) -> list[str]:
    """Tensors that a checkpoint may hold and nothing needs."""
    vision, language = VISION[model.vision.family], LANGUAGE[model.language.family]
    return [
        *map(keys.vision, vision.unused_prefixes(model.vision, model.vision.num_hidden_layers)),
        *map(keys.language, language.unused_prefixes(model.language)),
    ]
