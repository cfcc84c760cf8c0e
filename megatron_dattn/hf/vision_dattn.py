"""From pixels to visual tokens: the vision encoder up to its feature layer, and the adapter.

This file travels with the exported weights.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from .checkpointing_dattn import with_gradient
from .configuration_dattn import DAttnConfig
from .norms_dattn import RMSNorm


class VisionEmbeddings(nn.Module):
    """Patches as tokens, with the encoder's own positions; CLIP puts a class token in front."""

    def __init__(self, config: DAttnConfig) -> None:
        super().__init__()
        width, patch = config.vision_config.hidden_size, config.vision_config.patch_size
        has_token = config.is_clip
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=not has_token)
        self.position_embedding = nn.Embedding(config.tokens_per_image + has_token, width)
        self.class_embedding = nn.Parameter(torch.zeros(width)) if has_token else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[images, 3, side, side], any floating dtype -> [images, tokens, width], the weights'."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        tokens = patches.flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            tokens = torch.cat((self.class_embedding.expand(len(tokens), 1, -1), tokens), dim=1)
        return tokens + self.position_embedding.weight


class VisionEncoder(nn.Module):
    """The layers up to the feature layer."""

    def __init__(self, config: DAttnConfig) -> None:
        super().__init__()
        vision = config.vision_config
        if vision._attn_implementation is None:  # transformers sets it for whole models only
            vision._attn_implementation = "sdpa"
        num_layers = vision.num_hidden_layers + 1 + config.vision_feature_layer
        kind = CLIPEncoderLayer if config.is_clip else SiglipEncoderLayer
        self.layers = nn.ModuleList(kind(vision) for _ in range(num_layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """[images, tokens, width] -> the same shape and dtype."""
        for layer in self.layers:  # which checkpoint themselves
            (tokens,) = with_gradient(layer, tokens)
            tokens = layer(tokens, attention_mask=None)
        return tokens


class VisionTower(nn.Module):
    """SigLIP or CLIP up to its feature layer. Parameters have the names of `SiglipVisionModel` and
    `CLIPVisionModel`, one of which is misspelt."""

    def __init__(self, config: DAttnConfig) -> None:
        super().__init__()
        vision = config.vision_config
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.pre_layrnorm: nn.Module | None = None
        if config.is_clip:
            self.pre_layrnorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[images, 3, side, side], any floating dtype -> [images, patches, width], the weights'; a
        class token is left out."""
        tokens = self.embeddings(pixel_values)
        if self.pre_layrnorm is None:
            return self.encoder(tokens)
        return self.encoder(self.pre_layrnorm(tokens))[:, 1:]


class FeatureMLP(nn.Module):
    """Linear -> GELU -> linear, with RMSNorms before, behind, on both sides or on none."""

    def __init__(
        self, features: int, middle: int, hidden: int, norm_eps: float, norm: str = "before"
    ) -> None:
        super().__init__()
        self.norm: nn.Module = nn.Identity()
        self.output_norm: nn.Module = nn.Identity()
        if norm in ("before", "both"):
            self.norm = RMSNorm(features, norm_eps)
        if norm in ("behind", "both"):
            self.output_norm = RMSNorm(hidden, norm_eps)
        self.linear_1 = nn.Linear(features, middle)
        self.linear_2 = nn.Linear(middle, hidden)

    def forward(self, features: Tensor) -> Tensor:
        """[images, patches, encoder width] -> [images, patches, hidden], same dtype."""
        return self.output_norm(self.linear_2(F.gelu(self.linear_1(self.norm(features)))))


class Adapter(FeatureMLP):
    """The MLP, and positions of the patches in their image."""

    def __init__(self, config: DAttnConfig) -> None:
        super().__init__(
            config.vision_config.hidden_size,
            config.adapter_hidden_size,
            config.text_config.hidden_size,
            norm_eps=config.adapter_norm_eps,
            norm=config.adapter_norm,
        )
        self.positions = _positions(config)
        self.grid = config.image_grid

    def forward(self, features: Tensor) -> Tensor:
        tokens = super().forward(features)
        return tokens if self.positions is None else self.positions(tokens, self.grid)


def _positions(config: DAttnConfig) -> nn.Module | None:
    if config.visual_embedding == "row_column":
        return RowColumnPositions(config)
    if config.visual_embedding == "per_patch":
        return PerPatchPositions(config)
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

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Place the tokens, [images, patches, hidden], of the weights' dtype."""
        of_rows, of_columns = _entries(self.rows, grid[0]), _entries(self.columns, grid[1])
        return tokens + (of_rows.unsqueeze(1) + of_columns).flatten(0, 1)


def _entries(table: Tensor, count: int) -> Tensor:
    if count <= len(table):
        return table[:count]
    channels_first = table.t().unsqueeze(0)
    return F.interpolate(channels_first, size=count, mode="linear", align_corners=True)[0].t()


class PerPatchPositions(nn.Module):
    """A learned vector for every patch of a square grid; another grid resizes it bicubically."""

    def __init__(self, config: DAttnConfig) -> None:
        super().__init__()
        self.side = config.adapter_num_places
        self.patches = nn.Parameter(torch.zeros(self.side**2, config.text_config.hidden_size))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Place the tokens, [images, patches, hidden], of the weights' dtype."""
        if grid == (self.side, self.side):
            return tokens + self.patches
        picture = self.patches.to(torch.promote_types(self.patches.dtype, torch.float32))
        picture = picture.t().unflatten(1, (self.side, self.side)).unsqueeze(0)
        resized = F.interpolate(picture, size=grid, mode="bicubic", align_corners=False)
        return tokens + resized[0].flatten(1).t().to(self.patches.dtype)


class FractionalPositions(nn.Module):
    """last_norm(tokens + norm(MLP(row's place)) + norm(MLP(column's place))).

    But for the last, norms have no weights.

    A place is the share of the side in front of the patch, times `adapter_num_places` - 1. The MLPs
    compute in fp32.
    """

    def __init__(self, config: DAttnConfig) -> None:
        super().__init__()
        hidden = config.text_config.hidden_size
        self.hidden_size, self.eps = hidden, config.adapter_norm_eps
        self.num_places = config.adapter_num_places
        self.rows = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.columns = nn.Sequential(
            nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.last_norm = RMSNorm(hidden, config.adapter_norm_eps)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Place the tokens, [images, patches, hidden], of the weights' dtype."""
        height, width = grid
        of_rows = self._places(self.rows, height, tokens.dtype).repeat_interleave(width, 0)
        of_columns = self._places(self.columns, width, tokens.dtype).repeat(height, 1)
        # One after the other: in BF16 the sum of both positions would round differently.
        return self.last_norm(tokens + of_rows + of_columns)

    def _places(self, mlp: nn.Sequential, length: int, dtype: torch.dtype) -> Tensor:
        """What is added to the patches of each row, or of each column, [length, hidden_size]."""
        places = _in_fp32(mlp, self._sinusoids(length)).to(dtype)
        return F.rms_norm(places, (self.hidden_size,), None, self.eps)

    def _sinusoids(self, length: int) -> Tensor:
        """[length, hidden_size]: sines in even channels, cosines in odd ones."""
        weight = self.last_norm.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        places = torch.arange(length, device=weight.device, dtype=dtype)
        places = places / max(length - 1, 1) * (self.num_places - 1)
        channels = torch.arange(0, self.hidden_size, 2, device=weight.device, dtype=dtype)
        waves = torch.exp(channels * (-math.log(10_000.0) / self.hidden_size))
        angles = places.unsqueeze(1) * waves
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def _in_fp32(mlp: nn.Sequential, tokens: Tensor) -> Tensor:
    """The MLP in the dtype of its tokens, not of its weights."""
    for layer in mlp:
        if isinstance(layer, nn.Linear):
            tokens = F.linear(tokens, layer.weight.to(tokens.dtype), layer.bias.to(tokens.dtype))
        else:
            tokens = layer(tokens)
    return tokens
