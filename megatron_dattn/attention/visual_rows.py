"""What a decoder does with visual rows besides attending: which it keeps, and what it computes.

Depths and sizes are shares, so that a preset fits a decoder of any depth and width. The defaults
leave visual rows what text rows are: computed in full by every layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_dattn.errors import ConfigError

Grid = tuple[int, int]


@dataclass(frozen=True)
class VisualRows:
    """The life of visual rows in the decoder. Raises ConfigError for impossible values."""

    # "stream": the layers transform them, like text rows. "reproject": they have no state; every
    # layer projects the encoder's features to its own keys and values anew.
    source: Literal["stream", "reproject"] = "stream"
    # Share of an image's patches that enter the decoder: those that the encoder's class token
    # attends to most in the layer of the features; without a class token (SigLIP), those that the
    # image's patches attend to most. They keep their order.
    keep: float = 1.0
    # Share of the FFN's neurons, from the first on, that visual rows pass through; 0 skips the FFN.
    ffn: float = 1.0
    # Share of the key heads, from the first on, in which visual rows are read and read anything. In
    # the other heads their values count as zero, without renormalizing the softmax.
    heads: float = 1.0
    # Share of the layers after which visual rows are gone and text sees text alone.
    exit: float = 1.0
    # From this share of the layers on to that one, visual rows are read but stay as they are.
    frozen: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for conflict in _conflicts(self):
            raise ConfigError(f"attention: visual.{conflict}")


def _conflicts(rows: VisualRows) -> Iterator[str]:
    for name in ("keep", "heads", "exit"):
        if not 0.0 < getattr(rows, name) <= 1.0:
            yield f"{name} is a share above 0 and up to 1; it is {getattr(rows, name)}"
    if not 0.0 <= rows.ffn <= 1.0:
        yield f"ffn is a share from 0 to 1; it is {rows.ffn}"
    if rows.frozen is not None and not 0.0 <= rows.frozen[0] < rows.frozen[1] <= 1.0:
        yield f"frozen is a range of shares between 0 and 1; it is {rows.frozen}"
    if rows.source == "reproject" and rows.frozen is not None:
        yield "frozen has no effect on rows without a state; leave it out with source='reproject'"
    if rows.source == "reproject" and rows.ffn > 0.0:
        yield f"ffn={rows.ffn} would transform rows without a state; set ffn=0 with 'reproject'"


def kept_grid(grid: Grid, rows: VisualRows) -> Grid:
    """The grid of an image's rows in the decoder: kept patches, at least one, form a line."""
    if rows.keep == 1.0:
        return grid
    return 1, num_shared(grid[0] * grid[1], rows.keep)


def num_shared(count: int, share: float) -> int:
    """That share of a number of layers, heads or patches; at least one."""
    return max(1, round(share * count))
