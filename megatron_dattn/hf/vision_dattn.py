"""From pixels to visual rows: the SigLIP encoder up to its feature layer, and the adapter.

This file travels with the exported weights.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from .configuration_dattn import DAttnConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm; the statistics are taken in fp32 (fp64 for fp64 rows)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, rows: Tensor) -> Tensor:
        return self.weight * F.rms_norm(rows, self.weight.shape, None, self.eps)


class VisionEmbeddings(nn.Module):
    """Patches as rows, with the encoder's own positions."""

    def __init__(self, config: DAttnConfig) -> None:
        super().__init__()
        width, patch = config.vision_config.hidden_size, config.vision_config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch)
        self.position_embedding = nn.Embedding(config.rows_per_image, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        return patches.flatten(2).transpose(1, 2) + self.position_embedding.weight


class VisionEncoder(nn.Module):
    def __init__(self, config: SiglipVisionConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(num_layers))

    def forward(self, rows: Tensor) -> Tensor:
        for layer in self.layers:
            rows = layer(rows, attention_mask=None)
        return rows


class VisionTower(nn.Module):
    """SigLIP up to its feature layer. Parameters have the names of `SiglipVisionModel`."""

    def __init__(self, config: DAttnConfig) -> None:
        super().__init__()
        vision = config.vision_config
        if vision._attn_implementation is None:  # transformers sets it for whole models only
            vision._attn_implementation = "sdpa"
        self.embeddings = VisionEmbeddings(config)
        num_layers = vision.num_hidden_layers + 1 + config.vision_feature_layer
        self.encoder = VisionEncoder(vision, num_layers)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[images, 3, side, side] -> [images, patches, width]."""
        return self.encoder(self.embeddings(pixel_values))


class Adapter(nn.Module):
    """RMSNorm -> linear -> GELU -> linear -> positions of the patches in their image."""

    def __init__(self, config: DAttnConfig) -> None:
        super().__init__()
        features, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
        has_norm = config.adapter_input_norm
        self.norm = RMSNorm(features, config.adapter_norm_eps) if has_norm else nn.Identity()
        self.linear_1 = nn.Linear(features, config.adapter_hidden_size)
        self.linear_2 = nn.Linear(config.adapter_hidden_size, hidden)
        self.positions = _positions(config)
        self.grid = config.image_grid

    def forward(self, features: Tensor) -> Tensor:
        """[images, patches, encoder's width] -> [images, patches, language model's width]."""
        rows = self.linear_2(F.gelu(self.linear_1(self.norm(features))))
        return rows if self.positions is None else self.positions(rows, self.grid)


def _positions(config: DAttnConfig) -> nn.Module | None:
    if config.visual_embedding == "row_column":
        return RowColumnPositions(config)
    if config.visual_embedding == "fractional":
        return FractionalPositions(config)
    return None


class RowColumnPositions(nn.Module):
    """A learned vector for every row of patches and one for every column.

    A side longer than the table stretches the table by linear interpolation.
    """

    def __init__(self, config: DAttnConfig) -> None:
        super().__init__()
        shape = (config.adapter_max_grid, config.text_config.hidden_size)
        self.rows = nn.Parameter(torch.zeros(shape))
        self.columns = nn.Parameter(torch.zeros(shape))

    def forward(self, rows: Tensor, grid: tuple[int, int]) -> Tensor:
        of_rows, of_columns = _entries(self.rows, grid[0]), _entries(self.columns, grid[1])
        return rows + (of_rows.unsqueeze(1) + of_columns).flatten(0, 1)


def _entries(table: Tensor, count: int) -> Tensor:
    if count <= len(table):
        return table[:count]
    channels_first = table.t().unsqueeze(0)
    return F.interpolate(channels_first, size=count, mode="linear", align_corners=True)[0].t()


class FractionalPositions(nn.Module):
    """norm(norm(rows) + norm(MLP(row's place)) + norm(MLP(column's place))).

    A place is the share of the side in front of the patch, times `adapter_max_grid` - 1. The MLPs
    compute in fp32.
    """

    def __init__(self, config: DAttnConfig) -> None:
        super().__init__()
        hidden, eps = config.text_config.hidden_size, config.adapter_norm_eps
        self.num_places = config.adapter_max_grid
        self.rows = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.columns = nn.Sequential(
            nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.row_norm, self.column_norm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        self.input_norm, self.output_norm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)

    def forward(self, rows: Tensor, grid: tuple[int, int]) -> Tensor:
        of_rows = self.row_norm(_in_fp32(self.rows, self._sinusoids(grid[0])))
        of_columns = self.column_norm(_in_fp32(self.columns, self._sinusoids(grid[1])))
        places = (of_rows.unsqueeze(1) + of_columns).flatten(0, 1)
        return self.output_norm(self.input_norm(rows) + places.to(rows.dtype))

    def _sinusoids(self, length: int) -> Tensor:
        """[length, hidden_size]: sines, then cosines, of the places along a side."""
        weight = self.row_norm.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        stretch = (self.num_places - 1) / max(length - 1, 1)
        places = torch.arange(length, device=weight.device, dtype=dtype) * stretch
        half = len(weight) // 2
        steps = torch.arange(half, device=weight.device, dtype=dtype) / half
        angles = places.unsqueeze(1) * torch.exp(-math.log(10_000.0) * steps)
        return torch.cat((angles.sin(), angles.cos()), dim=1)


def _in_fp32(mlp: nn.Sequential, rows: Tensor) -> Tensor:
    """The MLP in the dtype of its rows, not of its weights."""
    for layer in mlp:
        if isinstance(layer, nn.Linear):
            rows = F.linear(rows, layer.weight.to(rows.dtype), layer.bias.to(rows.dtype))
        else:
            rows = layer(rows)
    return rows
