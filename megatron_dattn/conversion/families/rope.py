"""Rotary positions in a config.json, in both spellings: transformers 4's and transformers 5's.

Older files have `rope_theta` and `rope_scaling`, newer ones `rope_parameters` with the base in it.
Whatever would change the angles and is not understood is refused by name.
"""

from dataclasses import asdict, fields
from typing import Any

from megatron_dattn.attention.rotary_scaling import RotaryScaling
from megatron_dattn.conversion.io.hf_folder import ConfigValues
from megatron_dattn.errors import CheckpointError
from megatron_dattn.models.config import LanguageConfig

_SUPPORTED = "'default' and 'llama3'"
_LLAMA3 = tuple(field.name for field in fields(RotaryScaling))
_SECTIONS = ("rope_parameters", "rope_scaling")


def read_rope(config: ConfigValues, default_theta: float) -> tuple[float, RotaryScaling | None]:
    """The base of the frequencies, and how they are scaled.

    Args:
        default_theta: the base where config.json does not say it.

    Raises:
        CheckpointError: something that the training stack lacks, or two places that contradict
            each other.
    """
    given = {name: _read_section(config, name) for name in _SECTIONS}
    parameters, scaling = given.values()
    if parameters is not None and scaling is not None and _kind(parameters) != _kind(scaling):
        raise CheckpointError(
            f"{config.where} has rope_parameters and rope_scaling that contradict each other; "
            "delete the one that is wrong"
        )
    _check_partial(config)
    rope = parameters or scaling or ConfigValues({})
    thetas = {
        place.number("rope_theta")
        for place in (config, *filter(None, given.values()))
        if "rope_theta" in place.values
    }
    if len(thetas) > 1:
        raise CheckpointError(
            f"{config.where} has rope_theta {' and '.join(map(str, sorted(thetas)))} in two "
            "places; delete the one that is wrong"
        )
    return (thetas.pop() if thetas else default_theta), _scaling(rope)


def write_rope(language: LanguageConfig) -> dict[str, Any]:
    """The fields of a config.json, for readers of both spellings."""
    base = {"rope_theta": language.rope_theta}
    if language.rope_scaling is None:
        # The first is for readers from before transformers 5, which would take a default of theirs.
        return base | {"rope_parameters": {**base, "rope_type": "default"}}
    scaling = {"rope_type": "llama3", **asdict(language.rope_scaling)}
    return base | {"rope_scaling": scaling, "rope_parameters": {**base, **scaling}}


def _read_section(config: ConfigValues, name: str) -> ConfigValues | None:
    """A section that holds what is understood, and nothing else; None if it says nothing."""
    found = config.section_or_none(name)
    if not found:
        return None
    section = ConfigValues(
        {key: value for key, value in found.items() if value is not None or key == "rope_theta"},
        f"{name} of {config.where}",
    )
    by_layer = [key for key, value in found.items() if isinstance(value, dict)]
    if by_layer:
        raise CheckpointError(
            f"{section.where} has settings by type of layer ({', '.join(by_layer)}), which are "
            "not supported, only one setting for all layers"
        )
    kind = _kind_name(section)
    _check_partial(section)
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    unknown = section.values.keys() - known - set(_LLAMA3 if kind == "llama3" else ())
    if unknown:
        raise CheckpointError(
            f"{section.where} has {', '.join(sorted(unknown))}, which rope_type '{kind}' does not "
            "have: it would be ignored"
        )
    return section


def _kind_name(section: ConfigValues) -> str:
    """Its rope_type, which older files call `type`."""
    names = [section.values[key] for key in ("rope_type", "type") if key in section.values]
    kind = names[0] if names else "default"
    if any(name != kind for name in names):
        raise CheckpointError(f"{section.where} has rope_type '{kind}' and type '{names[1]}'")
    if kind not in ("default", "llama3"):
        raise CheckpointError(
            f"{section.where} has rope_type '{kind}', which is not supported, only {_SUPPORTED}"
        )
    return str(kind)


def _check_partial(config: ConfigValues) -> None:
    share = config.number_or_none("partial_rotary_factor")
    if share not in (None, 1.0):
        raise CheckpointError(
            f"{config.where} has partial_rotary_factor {share}, which is not supported: all "
            "channels are rotated"
        )


def _kind(section: ConfigValues) -> tuple[str, RotaryScaling | None]:
    return _kind_name(section), _scaling(section)


def _scaling(section: ConfigValues) -> RotaryScaling | None:
    if _kind_name(section) == "default":
        return None
    section.check_present(_LLAMA3)
    return RotaryScaling(
        factor=section.number("factor"),
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
        original_max_position_embeddings=section.whole("original_max_position_embeddings"),
    )
