"""The config of our own exports (`model_type: dattn`) back in our terms; `hf_config.py` writes it.

The exported config names the attention's axes, not the preset; an export of a preset that is no
longer in `attention/presets.py` is therefore refused.
"""

from typing import Any

from megatron_dattn.attention import PRESETS, AttentionConfig, Positions, TextToVisual
from megatron_dattn.conversion.config_values import ConfigValues
from megatron_dattn.conversion.decoder import with_required
from megatron_dattn.conversion.exportable import VISUAL_ROWS
from megatron_dattn.conversion.families import language_family, vision_family
from megatron_dattn.errors import CheckpointError, ConfigError
from megatron_dattn.hf.configuration_dattn import DAttnConfig
from megatron_dattn.models.config import AdapterConfig, LanguageConfig, ModelConfig, VisionConfig

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
        exported = DAttnConfig.from_dict(config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the model's config.json is not that of an export: {error}"
        ) from None
    preset = _preset(exported)
    if attention not in (None, preset):
        raise ConfigError(
            f"attention '{attention}' was asked for, but the model was trained with '{preset}'; "
            "leave --attention out"
        )
    language, values = _language_config(config), ConfigValues(vars(exported), _WHERE)
    width = values.whole("adapter_hidden_size")
    return ModelConfig(
        vision=_vision_config(config, values.whole("vision_feature_layer")),
        adapter=AdapterConfig(
            input_norm=values.flag("adapter_input_norm"),
            hidden_size=None if width == language.hidden_size else width,
            norm_eps=values.number("adapter_norm_eps"),
            max_grid=values.whole("adapter_max_grid"),
        ),
        language=language,
        attention=preset,
    )


def _preset(exported: Any) -> str:
    """The name of the preset with an export's axes; what no export has is as it is by default."""
    axes = AttentionConfig(
        v2v=exported.v2v,
        t2v=TextToVisual(scope=exported.t2v_scope, rotary=exported.t2v_rotary),
        positions=Positions(
            text=exported.text_positions,
            visual=exported.visual_positions,
            embedding=exported.visual_embedding,
        ),
        merge=exported.merge,
        visual=VISUAL_ROWS[exported.visual_source],
    )
    for name, preset in PRESETS.items():
        if preset == axes:
            return name
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
