"""Which module knows a model: chosen by the model_type of its config.json, or by our family name.

A family is a module. Adding one is writing the module and naming it here.
"""

from typing import Any, Protocol, TypeVar

from megatron_dattn.conversion.families import clip, gemma2, llama, mistral, qwen2, qwen3, siglip
from megatron_dattn.conversion.families.weight_map import Rule
from megatron_dattn.errors import CheckpointError
from megatron_dattn.models.config import LanguageConfig, VisionConfig


class LanguageFamily(Protocol):
    """What a language family's module offers."""

    @property
    def MODEL_TYPES(self) -> tuple[str, ...]:
        """Of config.json."""

    @property
    def DEFAULTS(self) -> dict[str, Any]:
        """Of the Hugging Face config class, by the names of config.json."""

    def language_config(self, config: dict[str, Any]) -> LanguageConfig: ...

    def hf_config(self, language: LanguageConfig) -> dict[str, Any]: ...

    def language_rules(self, config: LanguageConfig) -> list[Rule]: ...

    def unused_prefixes(self, config: LanguageConfig) -> list[str]: ...


class VisionFamily(Protocol):
    """What a vision family's module offers."""

    @property
    def MODEL_TYPES(self) -> tuple[str, ...]:
        """Of config.json: of a whole dual encoder and of its vision encoder alone."""

    @property
    def DEFAULTS(self) -> dict[str, Any]:
        """Of the Hugging Face config class, by the names of config.json."""

    def vision_config(self, config: dict[str, Any], feature_layer: int = -2) -> VisionConfig: ...

    def hf_config(self, vision: VisionConfig, num_layers: int) -> dict[str, Any]: ...

    def vision_rules(self, config: VisionConfig) -> list[Rule]: ...

    def unused_prefixes(self, config: VisionConfig, num_layers: int) -> list[str]: ...


_Family = TypeVar("_Family", LanguageFamily, VisionFamily)

LANGUAGE: dict[str, LanguageFamily] = {
    "gemma2": gemma2,
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
}
"""By `LanguageConfig.family`."""
VISION: dict[str, VisionFamily] = {"clip": clip, "siglip": siglip}
"""By `VisionConfig.family`."""
WHOLE_MODELS = ("llava", "dattn")
"""Model types of encoder and language model together, see `vlm_source.py`."""


def language_family(config: dict[str, Any]) -> LanguageFamily:
    """The family of a language model's config.json.

    Raises:
        CheckpointError: another architecture; names what is supported.
    """
    return _family("language model", LANGUAGE, config)


def vision_family(config: dict[str, Any]) -> VisionFamily:
    """The family of a vision encoder's config.json, or of a whole dual encoder's.

    Raises:
        CheckpointError: another architecture; names what is supported.
    """
    return _family("vision encoder", VISION, config)


def _family(what: str, families: dict[str, _Family], config: dict[str, Any]) -> _Family:
    for family in families.values():
        if config.get("model_type") in family.MODEL_TYPES:
            return family
    types = [name for family in families.values() for name in family.MODEL_TYPES]
    kind = config.get("model_type")
    raise CheckpointError(
        f"the {what} is of type '{kind}'; supported: {', '.join(types)}{_hint(kind)}"
    )


def _hint(kind: object) -> str:
    """Which option takes a model of that type."""
    if kind in WHOLE_MODELS:
        return "; it is a whole model: give it with --model"
    if any(kind in family.MODEL_TYPES for family in LANGUAGE.values()):
        return "; give it with --language"
    if any(kind in family.MODEL_TYPES for family in VISION.values()):
        return "; give it with --vision"
    return ""


def language_rules(config: LanguageConfig) -> list[Rule]:
    """Rules for every parameter of the language model (prefix `language_model.`)."""
    return LANGUAGE[config.family].language_rules(config)


def vision_rules(config: VisionConfig) -> list[Rule]:
    """Rules for every parameter of the vision encoder (prefix `vision_model.`)."""
    return VISION[config.family].vision_rules(config)
