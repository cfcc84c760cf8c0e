"""Which attention presets context parallelism serves, and why it refuses the others."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.presets import PRESETS, get_preset
from megatron_dattn.errors import ConfigError


def check_preset(name: str, context_parallel_size: int) -> None:
    """Refuse a preset under which a visual token needs more than is on its rank.

    Raises:
        ConfigError: with the reason, and the nearest preset that is served.
    """
    reason = unserved(get_preset(name))
    if context_parallel_size > 1 and reason is not None:
        raise ConfigError(
            f"parallel.context_parallel_size {context_parallel_size} does not serve "
            f"model.attention '{name}': {reason}; the nearest preset that it serves is "
            f"'{nearest_served(name)}', or set it to 1"
        )


def unserved(config: AttentionConfig) -> str | None:
    """The reason for which the images of a pack cannot be spread over ranks; None if they can."""
    if config.scores_visual_tokens:
        sees = "and text " if config.v2t != "none" else ""
        return (
            f"its visual tokens attend to others {sees}(v2v='{config.v2v}', v2t='{config.v2t}'), "
            "whose keys and values every layer would have to send to all ranks"
        )
    if config.window == "reading_order":
        return (
            "its sliding window counts images among the text (window='reading_order'), and a rank "
            "has not all of them"
        )
    return None


def nearest_served(name: str) -> str:
    """The preset that is served and differs in the fewest axes; the first of several."""
    served = [other for other, config in PRESETS.items() if unserved(config) is None]
    wanted = dict(_axes(get_preset(name)))

    def distance(other: str) -> int:
        return sum(wanted[axis] != value for axis, value in _axes(get_preset(other)))

    return min(served, key=distance)


def _axes(config: AttentionConfig) -> Iterator[tuple[str, Any]]:
    for name, value in asdict(config).items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", of_inner) for inner, of_inner in value.items())
        elif name != "about":
            yield name, value
