"""Learnable positions of patches in their image, as vectors that are added to visual tokens.

They stand in for the rotary positions that debiased attention does not give to visual tokens. The
paper (section 2.3) calls them "similar to those used in CLIP", which learns one vector per patch
(`PerPatchPositions`). One vector per row plus one per column (`RowColumnPositions`) says the same
of where a patch is with far fewer numbers, of which each is trained by every image's whole row or
column of patches. Both start at zero, that is, as no positions at all. `FractionalPositions` know a
patch's place as a share of its image's side.
"""

import math

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_dattn.models.norm import RMSNorm

_LONGEST_WAVE = 10_000.0


class RowColumnPositions(torch.nn.Module):
    """One vector per row of patches plus one per column.

    A grid of up to `max_grid` rows (columns) takes the first entries of the table; a larger one
    stretches the whole table over its side by linear interpolation.
    """

    def __init__(self, hidden_size: int, max_grid: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = torch.nn.Parameter(torch.zeros(max_grid, hidden_size, dtype=dtype))
        self.columns = torch.nn.Parameter(torch.zeros(max_grid, hidden_size, dtype=dtype))

    def forward(self, tokens: Tensor, grid: tuple[int, int], kept: Tensor | None = None) -> Tensor:
        """Place the tokens.

        Args:
            tokens: [images, patches, hidden_size], of the weights' dtype, all images of the same
                patch grid.
            grid: patch rows and patch columns.
            kept: which of the grid's patches, counted row by row, an image's tokens are, int64
                [images, patches]; None if they are all of them, in this order.

        Returns:
            The tokens with their positions, of the same shape.
        """
        table = self.table(grid)
        return tokens + (table if kept is None else table[kept])

    def table(self, grid: tuple[int, int]) -> Tensor:
        """Positions of a grid's patches, row-major, [rows * columns, hidden_size], of the
        parameters' dtype."""
        rows, columns = _entries(self.rows, grid[0]), _entries(self.columns, grid[1])
        return (rows.unsqueeze(1) + columns).flatten(0, 1)


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

    def forward(self, tokens: Tensor, grid: tuple[int, int], kept: Tensor | None = None) -> Tensor:
        """Place the tokens, [images, patches, hidden_size], same dtype; arguments and result as of
        `RowColumnPositions`."""
        table = self.table(grid)
        return tokens + (table if kept is None else table[kept])

    def table(self, grid: tuple[int, int]) -> Tensor:
        """Positions of a grid's patches, row-major, [rows * columns, hidden_size], of the
        parameters' dtype."""
        if grid == (self.side, self.side):
            return self.patches
        picture = self.patches.to(torch.promote_types(self.patches.dtype, torch.float32))
        picture = picture.t().unflatten(1, (self.side, self.side)).unsqueeze(0)
        resized = F.interpolate(picture, size=grid, mode="bicubic", align_corners=False)
        return resized[0].flatten(1).t().to(self.patches.dtype)


class FractionalPositions(torch.nn.Module):
    """last_norm(tokens + norm(MLP(row's place)) + norm(MLP(column's place))).

    Vidi, the later video models of the paper's authors, realizes the learnable positions of section
    2.3 by an MLP over a sinusoid, and normalizes what it adds to the tokens. Names, order of
    operations and precisions are such that its weights fit. Left out: the noise that its authors
    add to the places in training, the positions of tiles and of a video's frames.

    A side of l patches is stretched to `num_places` places: patch p stands at p / (l - 1) *
    (num_places - 1), the only patch of a side at 0. So grids of any size share the same range, and
    no table limits them. The MLPs (linear, GELU, linear, as wide as the tokens) compute in fp32;
    what they give is rounded to the tokens' dtype and normalized there, by RMSNorms without
    weights. The last norm has weights; `Adapter.start_at` says what they start at.

    Args:
        config: gives the parameters' dtype.
        hidden_size: of the language model; even.
        num_places: how far a side is stretched.
        norm_eps: of the norms.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, num_places: int, norm_eps: float
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_places = num_places
        self.norm_eps = norm_eps
        self.rows = _place_mlp(hidden_size, config.params_dtype)
        self.columns = _place_mlp(hidden_size, config.params_dtype)
        self.last_norm = RMSNorm(config, hidden_size, eps=norm_eps)

    def forward(self, tokens: Tensor, grid: tuple[int, int], kept: Tensor | None = None) -> Tensor:
        """Place the tokens, [images, patches, hidden_size], same dtype; arguments and result as of
        `RowColumnPositions`."""
        height, width = grid
        dtype = tokens.dtype
        of_rows, of_columns = self.of_rows(height, dtype), self.of_columns(width, dtype)
        if kept is None:
            of_rows, of_columns = of_rows.repeat_interleave(width, 0), of_columns.repeat(height, 1)
        else:
            of_rows, of_columns = of_rows[kept // width], of_columns[kept % width]
        # One after the other: in BF16 the sum of both positions would round differently.
        return self.last_norm(tokens + of_rows + of_columns)

    def of_rows(self, length: int, dtype: torch.dtype) -> Tensor:
        """Positions of the patches of each of `length` rows, [length, hidden_size] in `dtype`."""
        return self._normed(self.rows(self._sinusoids(length)).to(dtype))

    def of_columns(self, length: int, dtype: torch.dtype) -> Tensor:
        """The same of columns, [length, hidden_size] in `dtype`."""
        return self._normed(self.columns(self._sinusoids(length)).to(dtype))

    def _normed(self, places: Tensor) -> Tensor:
        return F.rms_norm(places, (self.hidden_size,), None, self.norm_eps)

    def _sinusoids(self, length: int) -> Tensor:
        """[length, hidden_size]: of the places along a side of patches, sines in even channels and
        cosines in odd ones, a wave's two side by side."""
        weight = self.last_norm.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        places = torch.arange(length, device=weight.device, dtype=dtype)
        places = places / max(length - 1, 1) * (self.num_places - 1)
        channels = torch.arange(0, self.hidden_size, 2, device=weight.device, dtype=dtype)
        waves = torch.exp(channels * (-math.log(_LONGEST_WAVE) / self.hidden_size))
        angles = places.unsqueeze(1) * waves
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def _entries(table: Tensor, count: int) -> Tensor:
    if count <= table.shape[0]:
        return table[:count]
    channels_first = table.t().unsqueeze(0)
    return F.interpolate(channels_first, size=count, mode="linear", align_corners=True)[0].t()


class _LinearInInputType(torch.nn.Linear):
    """A linear layer that computes in the dtype of its input, not of its weights."""

    def forward(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight.to(rows.dtype), self.bias.to(rows.dtype))


def _place_mlp(width: int, dtype: torch.dtype) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        _LinearInInputType(width, width, dtype=dtype),
        torch.nn.GELU(),
        _LinearInInputType(width, width, dtype=dtype),
    )
