"""Concentric rings of an image's patches, from the border to the centre.

Ring r of a grid of H x W patches holds those at distance r from the nearest border. A grid with an
odd shorter side has a line of patches, or a single one, in its centre.
"""

from functools import lru_cache

import torch
from torch import Tensor

from megatron_dattn.attention.layout import TokenRange
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
