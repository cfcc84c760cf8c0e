"""The config of our own exports (`model_type: dattn`) in our terms; `hf_export` writes it.

The exported config names the attention's axes, not the preset; an export of a preset that is no
longer in `attention/presets.py` is therefore refused.
"""

from dataclasses import replace
from typing import Any, Literal, cast

from megatron_dattn.attention import PRESETS, AttentionConfig
from megatron_dattn.attention.config import Positions, TextToVisual
from megatron_dattn.conversion.families.decoder import with_required
from megatron_dattn.conversion.families.exportable import VISUAL_TOKENS
from megatron_dattn.conversion.families.registry import language_family, vision_family
from megatron_dattn.conversion.io.hf_folder import ConfigValues
from megatron_dattn.errors import CheckpointError, ConfigError
from megatron_dattn.hf.configuration_dattn import DAttnConfig
from megatron_dattn.models.config import (
    AdapterConfig,
    AdapterNorm,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
    default_norm,
    norm_of_older_name,
)

MODEL_TYPE = DAttnConfig.model_type
# What the sections are where they do not say it.
_VISION_TYPE, _TEXT_TYPE = "siglip_vision_model", "mistral"
_WHERE = "the model's config.json"


def model_from_config(config: dict[str, Any], attention: str | None = None) -> ModelConfig:
    """Translate a config.json.

    Args:
        attention: the preset, if the caller insists on one.

    Raises:
        CheckpointError: the exported code does not know it, or no preset has its axes.
        ConfigError: another preset than the model's was asked for.
    """
    try:
        exported = DAttnConfig.from_dict(_with_adapter_norm(config))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the model's config.json is not that of an export: {error}"
        ) from None
    preset, visual_position = _preset(exported)
    if attention not in (None, preset):
        raise ConfigError(
            f"attention '{attention}' was asked for, but the model was trained with '{preset}'; "
            "leave --attention out"
        )
    language, values = _language_config(config), ConfigValues(vars(exported), _WHERE)
    width = values.whole("adapter_hidden_size")
    vision = _vision_config(config, values.whole("vision_feature_layer"))
    norm = cast(AdapterNorm, exported.adapter_norm)  # DAttnConfig knows no other
    places = values.whole_or_none("adapter_num_places")
    return ModelConfig(
        vision=vision,
        adapter=AdapterConfig(
            norm=None if norm == default_norm(preset) else norm,
            hidden_size=None if width == language.hidden_size else width,
            norm_eps=values.number("adapter_norm_eps"),
            visual_position=visual_position,
            max_grid=values.whole("adapter_max_grid"),
            num_places=None if places == vision.grid[0] else places,
        ),
        language=language,
        attention=preset,
    )


def _with_adapter_norm(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json in which older exports, too, say where the adapter's norm stands."""
    if "adapter_input_norm" not in config:
        return config
    config = dict(config)
    older = ConfigValues({"adapter_input_norm": config.pop("adapter_input_norm")}, _WHERE)
    if "adapter_norm" in config or older.values["adapter_input_norm"] is None:
        return config
    return {**config, "adapter_norm": norm_of_older_name(older.flag("adapter_input_norm"))}


def _preset(exported: Any) -> tuple[str, Literal["row_column", "per_patch"]]:
    """The name of the preset with an export's axes, and what learnable positions it was given;
    what no export has is as it is by default."""
    axes = AttentionConfig(
        v2v=exported.v2v,
        t2v=TextToVisual(scope=exported.t2v_scope, rotary=exported.t2v_rotary),
        positions=Positions(
            text=exported.text_positions,
            visual=exported.visual_positions,
            embedding=exported.visual_embedding,
        ),
        merge=exported.merge,
        visual=VISUAL_TOKENS[exported.visual_source],
    )
    for name, preset in PRESETS.items():
        if preset == axes:
            return name, "row_column"
    if axes.positions.embedding == "per_patch":
        usual = replace(axes, positions=replace(axes.positions, embedding="row_column"))
        for name, preset in PRESETS.items():
            if preset == usual:
                return name, "per_patch"
    raise CheckpointError(
        f"no attention preset has the model's axes; add {axes} to attention/presets.py"
    )


def _vision_config(config: dict[str, Any], feature_layer: int) -> VisionConfig:
    found = ConfigValues(config, _WHERE).section_or_none("vision_config")
    section = {"model_type": _VISION_TYPE, **(found or {})}
    return vision_family(section).vision_config(section, feature_layer)


def _language_config(config: dict[str, Any]) -> LanguageConfig:
    found = ConfigValues(config, _WHERE).section_or_none("text_config")
    section = {"model_type": _TEXT_TYPE, **(found or {})}
    family = language_family(section)
    return family.language_config(with_required(section, family.DEFAULTS))
