"""What a decoder does with visual tokens besides attending: which it keeps, and what it computes.

Depths and sizes are shares, so that a preset fits a decoder of any depth and width; a half is
rounded up. The defaults leave visual tokens what text tokens are: computed in full by every layer.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megatron_dattn.errors import ConfigError

Grid = tuple[int, int]


@dataclass(frozen=True)
class VisualTokensConfig:
    """The life of visual tokens in the decoder. Raises ConfigError for impossible values."""

    # "stream": the layers transform them, like text tokens. "reproject": they have no state; every
    # layer projects the encoder's features to its own keys and values anew.
    source: Literal["stream", "reproject"] = "stream"
    # Share of an image's patches that enter the decoder: those that the encoder's class token
    # attends to most in the layer of the features; without a class token (SigLIP), those that the
    # image's patches attend to most. They keep their order.
    keep: float = 1.0
    # Share of the FFN's neurons, from the first on, that visual tokens pass through; 0 skips the
    # FFN.
    ffn: float = 1.0
    # Share of the key heads, from the first on, in which visual tokens are read and read anything.
    # In the other heads their values count as zero, without renormalizing the softmax. This is a
    # mask: it changes the model and saves no work.
    heads: float = 1.0
    # Share of the layers after which visual tokens are gone and text sees text alone: its softmax
    # is over text, where zeroed values of visual tokens would leave a smaller sum.
    exit: float = 1.0
    # From this share of the layers on to that one, visual tokens are read but stay as they are. The
    # last layer is among them only if the range ends at 1.
    frozen: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for conflict in _conflicts(self):
            raise ConfigError(f"attention: visual.{conflict}")


def _conflicts(tokens: VisualTokensConfig) -> Iterator[str]:
    yield from unknown_values(tokens)
    for name in ("keep", "heads", "exit"):
        if not (_is_share(share := getattr(tokens, name)) and share > 0.0):
            yield f"{name} is a share above 0 and up to 1; it is {share!r}"
    if not _is_share(tokens.ffn):
        yield f"ffn is a share from 0 to 1; it is {tokens.ffn!r}"
    if tokens.frozen is not None and not _is_range(tokens.frozen):
        yield f"frozen is a range of shares between 0 and 1; it is {tokens.frozen!r}"
    if tokens.source == "reproject" and tokens.frozen is not None:
        yield "frozen has no effect on tokens without a state; leave it out with source='reproject'"
    if tokens.source == "reproject" and tokens.ffn > 0.0:
        yield f"ffn={tokens.ffn} would transform tokens without a state; set ffn=0 with 'reproject'"


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and 0.0 <= value <= 1.0


def _is_range(value: object) -> bool:
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    return _is_share(value[0]) and _is_share(value[1]) and value[0] < value[1]


def kept_grid(grid: Grid, tokens: VisualTokensConfig) -> Grid:
    """The grid of an image's tokens in the decoder: kept patches, at least one, form a line."""
    if tokens.keep == 1.0:
        return grid
    return 1, num_shared(grid[0] * grid[1], tokens.keep)


def num_shared(count: int, share: float) -> int:
    """That share of a number of layers, heads or patches, see `rounded_share`; at least one."""
    return max(1, rounded_share(count, share))


def rounded_share(count: int, share: float) -> int:
    """The nearest whole number to a share of `count`; halves are rounded up.

    The share counts as it is written: 0.29 of 50 is 14.5 and gives 15, though the float that stands
    for 0.29 is a little less.
    """
    return math.floor(Fraction(str(share)) * count + Fraction(1, 2))


def unknown_values(axes: Any, section: str = "") -> Iterator[str]:
    """Mistakes in the values of a dataclass whose fields are choices or flags.

    A misspelt value would be taken for one of the others.

    Args:
        section: what stands before the fields' names, "t2v." for instance.
    """
    for name, hint in get_type_hints(type(axes)).items():
        value = getattr(axes, name)
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        if choices and value not in choices:
            known = ", ".join(repr(choice) for choice in choices)
            yield f"{section}{name} is one of {known}; it is {value!r}"
        if hint is bool and not isinstance(value, bool):
            yield f"{section}{name} is True or False; it is {value!r}"
