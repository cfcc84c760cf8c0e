"""Visual positions from a patch's place as a share of its image's side (Vidi).

Vidi, the later video models of the paper's authors, realizes the learnable positions of section 2.3
by an MLP over a sinusoid, and normalizes what it adds them to. Left out here: the noise on the
place in training, and a third MLP over the time axis of videos.
"""

import math

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_dattn.models.norm import RMSNorm

_LONGEST_WAVE = 10_000.0


class FractionalPositions(torch.nn.Module):
    """norm(norm(rows) + norm(MLP(row's place)) + norm(MLP(column's place))), all norms RMSNorms.

    A side of l patches is stretched to `num_places` places: patch p stands at p / (l - 1) *
    (num_places - 1), the only patch of a side at 0. So grids of any size share the same range, and
    no table limits them. The MLPs (linear, GELU, linear, as wide as the rows) compute in fp32.

    Args:
        config: gives the parameters' dtype.
        hidden_size: of the language model; even.
        num_places: how far a side is stretched.
        norm_eps: of the norms.
        scale: what the last norm's weights start at. The standard deviation of the language model's
            token embeddings makes visual rows as large as text rows; the caller must know it, since
            the adapter is made before any embedding is loaded.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        *,
        num_places: int,
        norm_eps: float,
        scale: float,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_places = num_places
        self.rows = _place_mlp(hidden_size, config.params_dtype)
        self.columns = _place_mlp(hidden_size, config.params_dtype)
        self.row_norm = RMSNorm(config, hidden_size, eps=norm_eps)
        self.column_norm = RMSNorm(config, hidden_size, eps=norm_eps)
        self.input_norm = RMSNorm(config, hidden_size, eps=norm_eps)
        self.output_norm = RMSNorm(config, hidden_size, eps=norm_eps)
        torch.nn.init.constant_(self.output_norm.weight, scale)

    def forward(self, rows: Tensor, grid: tuple[int, int], kept: Tensor | None = None) -> Tensor:
        """Place the rows; arguments and result as of `RowColumnPositions`."""
        places = self.table(grid).to(rows.dtype)
        if kept is not None:
            places = places[kept]
        return self.output_norm(self.input_norm(rows) + places)

    def table(self, grid: tuple[int, int]) -> Tensor:
        """Positions of a grid's patches, row-major, [rows * columns, hidden_size], fp32."""
        rows = self.row_norm(self.rows(self._sinusoids(grid[0])))
        columns = self.column_norm(self.columns(self._sinusoids(grid[1])))
        return (rows.unsqueeze(1) + columns).flatten(0, 1)

    def _sinusoids(self, length: int) -> Tensor:
        """[length, hidden_size]: sines, then cosines, of the places along a side of patches."""
        weight = self.row_norm.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        stretch = (self.num_places - 1) / max(length - 1, 1)
        places = torch.arange(length, device=weight.device, dtype=dtype) * stretch
        half = self.hidden_size // 2
        steps = torch.arange(half, device=weight.device, dtype=dtype) / half
        angles = places.unsqueeze(1) * torch.exp(-math.log(_LONGEST_WAVE) * steps)
        return torch.cat((angles.sin(), angles.cos()), dim=1)


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
