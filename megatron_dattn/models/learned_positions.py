"""Learnable positions of patches in their image, as vectors that are added to visual rows.

They stand in for the rotary positions that debiased attention does not give to visual rows. The
paper (section 2.3) calls them "similar to those used in CLIP", which learns one vector per patch.
One vector per row plus one per column says the same of where a patch is with far fewer numbers, of
which each is trained by every image's whole row or column of patches.

Both start at zero, that is, as no positions at all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class RowColumnPositions(torch.nn.Module):
    """One vector per row of patches plus one per column.

    A grid of up to `max_grid` rows (columns) takes the first entries of the table; a larger one
    stretches the whole table over its side by linear interpolation.
    """

    def __init__(self, hidden_size: int, max_grid: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = torch.nn.Parameter(torch.zeros(max_grid, hidden_size, dtype=dtype))
        self.columns = torch.nn.Parameter(torch.zeros(max_grid, hidden_size, dtype=dtype))

    def forward(self, rows: Tensor, grid: tuple[int, int], kept: Tensor | None = None) -> Tensor:
        """Place the rows.

        Args:
            rows: [images, patches, hidden_size], all images of the same patch grid.
            grid: patch rows and patch columns.
            kept: which of the grid's patches, counted row by row, an image's rows are, int64
                [images, patches]; None if they are all of them, in this order.

        Returns:
            The rows with their positions, of the same shape.
        """
        table = self.table(grid)
        return rows + (table if kept is None else table[kept])

    def table(self, grid: tuple[int, int]) -> Tensor:
        """Positions of a grid's patches, row-major, [rows * columns, hidden_size]."""
        rows, columns = _entries(self.rows, grid[0]), _entries(self.columns, grid[1])
        return (rows.unsqueeze(1) + columns).flatten(0, 1)


def _entries(table: Tensor, count: int) -> Tensor:
    if count <= table.shape[0]:
        return table[:count]
    channels_first = table.t().unsqueeze(0)
    return F.interpolate(channels_first, size=count, mode="linear", align_corners=True)[0].t()


class PerPatchPositions(torch.nn.Module):
    """One vector per patch of a square grid.

    Another grid takes the table as a picture that is resized bicubically, each patch by the place
    of its centre: what ViTs do with their position embeddings, Hugging Face's CLIP and SigLIP among
    them. The resizing is fp32, because kernels for BF16 round between their two directions.

    Args:
        hidden_size: of the language model.
        side: of the grid that is learned for, in patches.
        dtype: of the table.
    """

    def __init__(self, hidden_size: int, side: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.side = side
        self.patches = torch.nn.Parameter(torch.zeros(side * side, hidden_size, dtype=dtype))

    def forward(self, rows: Tensor, grid: tuple[int, int], kept: Tensor | None = None) -> Tensor:
        """Place the rows; arguments and result as of `RowColumnPositions`."""
        table = self.table(grid)
        return rows + (table if kept is None else table[kept])

    def table(self, grid: tuple[int, int]) -> Tensor:
        """Positions of a grid's patches, row-major, [rows * columns, hidden_size]."""
        if grid == (self.side, self.side):
            return self.patches
        picture = self.patches.to(torch.promote_types(self.patches.dtype, torch.float32))
        picture = picture.t().unflatten(1, (self.side, self.side)).unsqueeze(0)
        resized = F.interpolate(picture, size=grid, mode="bicubic", align_corners=False)
        return resized[0].flatten(1).t().to(self.patches.dtype)
