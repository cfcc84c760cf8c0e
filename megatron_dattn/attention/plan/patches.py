"""Patches of an image: its concentric rings, and the segments between patches.

Ring r of a grid of H x W patches holds those at distance r from the nearest border. A grid with an
odd shorter side has a line of patches, or a single one, in its centre.

Segments are hundreds per image, and the same ones for every image. They are worked out once for
every grid, for an image whose first patch is token 0, and moved to where the images of a pack
stand. So a plan costs a few tensor operations per image, however many patches there are.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_dattn.attention.layout import TokenLayout, TokenRange
from megatron_dattn.attention.plan.index import RangeTable, range_table
from megatron_dattn.attention.visual_config import Grid


def num_rings(grid: Grid) -> int:
    """Rings of a grid; a single patch, or a line of them, is one."""
    return (min(grid) + 1) // 2


def ring_size(grid: Grid, ring: int) -> int:
    """Patches of a ring: what it and all further inside have, less what those inside have."""
    height, width = (side - 2 * ring for side in grid)
    return height * width - max(height - 2, 0) * max(width - 2, 0)


def last_of_centre(grid: Grid) -> int:
    """Place of the last patch of the innermost ring, counted row by row from 0."""
    height, width = grid
    inset = num_rings(grid) - 1
    return (height - 1 - inset) * width + width - 1 - inset


@lru_cache(maxsize=64)
def ring_of_patches(grid: Grid) -> Tensor:
    """The ring of every patch, row by row, int64 [H * W]. Shared: not to be written to."""
    row, column = (torch.arange(side) for side in grid)
    from_row = torch.minimum(row, row.flip(0)).unsqueeze(1)
    return torch.minimum(from_row, torch.minimum(column, column.flip(0))).flatten()


def ring_ranges(grid: Grid, ring: int) -> list[TokenRange]:
    """Places of a ring's patches, as ranges in reading order."""
    height, width = grid
    first, last = ring, width - 1 - ring
    top, bottom = ring, height - 1 - ring
    ranges = [(top * width + first, top * width + last + 1)]
    for row in range(top + 1, bottom):
        ranges.append((row * width + first, row * width + first + 1))
        if last > first:
            ranges.append((row * width + last, row * width + last + 1))
    if bottom > top:
        ranges.append((bottom * width + first, bottom * width + last + 1))
    return ranges


@dataclass(frozen=True)
class SegmentTable:
    """Segments by columns: their ranges of tokens one after the other, and their lengths."""

    queries: RangeTable  # some ranges may be empty, no segment is
    keys: RangeTable
    query_lengths: tuple[int, ...]  # tokens per segment
    key_lengths: tuple[int, ...]


def segments_within_rings(layout: TokenLayout) -> SegmentTable:
    """Every ring of an image sees itself, those outside of it, and the sample's earlier images."""
    moved = []
    for image, (start, _) in zip(layout.images, layout.image_tokens, strict=True):
        segments, first = _rings(image.grid), layout.visual_tokens(image.sample)[0]
        # Each ring's first range of keys is empty in `segments`: there go the earlier images.
        keys = segments.keys + start
        keys[_earlier_images(image.grid), 0] = first
        lengths = tuple(length + start - first for length in segments.key_lengths)
        moved.append(SegmentTable(segments.queries + start, keys, segments.query_lengths, lengths))
    return _join(moved)


def segments_within_windows(layout: TokenLayout, reach: int) -> SegmentTable:
    """Every patch sees those of its image that are at most `reach` rows and columns away."""
    moved = []
    for image, (start, _) in zip(layout.images, layout.image_tokens, strict=True):
        segments = _windows(image.grid, reach)
        moved.append(
            SegmentTable(
                segments.queries + start,
                segments.keys + start,
                segments.query_lengths,
                segments.key_lengths,
            )
        )
    return _join(moved)


@lru_cache(maxsize=64)
def _rings(grid: Grid) -> SegmentTable:
    rings = [ring_ranges(grid, ring) for ring in range(num_rings(grid))]
    sizes = [ring_size(grid, ring) for ring in range(num_rings(grid))]
    seen = [[(0, 0), *chain(*rings[: ring + 1])] for ring in range(num_rings(grid))]
    return SegmentTable(
        range_table(tokens for ring in rings for tokens in ring),
        range_table(tokens for ranges in seen for tokens in ranges),
        tuple(sizes),
        tuple(sum(sizes[: ring + 1]) for ring in range(num_rings(grid))),
    )


@lru_cache(maxsize=64)
def _earlier_images(grid: Grid) -> NDArray[np.int64]:
    """Which ranges of the keys of `_rings` are kept free for earlier images."""
    starts, ends = _rings(grid).keys.T
    return np.flatnonzero(starts == ends)


@lru_cache(maxsize=64)
def _windows(grid: Grid, reach: int) -> SegmentTable:
    height, width = grid
    keys, lengths = [], []
    for row, column in product(range(height), range(width)):
        left, right = max(0, column - reach), min(width, column + reach + 1)
        rows = range(max(0, row - reach), min(height, row + reach + 1))
        keys += [(line * width + left, line * width + right) for line in rows]
        lengths.append(len(rows) * (right - left))
    patches = height * width
    queries = range_table((patch, patch + 1) for patch in range(patches))
    return SegmentTable(queries, range_table(keys), (1,) * patches, tuple(lengths))


def _join(images: list[SegmentTable]) -> SegmentTable:
    nothing = range_table([])
    return SegmentTable(
        np.concatenate([nothing, *(image.queries for image in images)]),
        np.concatenate([nothing, *(image.keys for image in images)]),
        tuple(length for image in images for length in image.query_lengths),
        tuple(length for image in images for length in image.key_lengths),
    )
