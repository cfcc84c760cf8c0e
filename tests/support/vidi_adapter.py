"""The adapter of Vidi for one image without tiles, written from its formulas as an oracle.

Parameters have the names of the published checkpoints (behind `model.`), so that this file also
says where each of them belongs. For features X [patches, v], d = the language model's width, a side
of n patches, N places, eps = 1e-5 in every norm, rms(x) = x / sqrt(mean(x^2) + eps):

    Y = gelu(X W0 + b0) W2 + b2                        mm_rand_projector.model.{0,2}
    Y = w * rms(Y)                                     mm_rand_norm, w = 1 at first
    Y = Y + rms(mlp_h(s(i (N - 1) / (n - 1))))         mm_rand_pos_h.mlp.{0,2}, patch token i
    Y = Y + rms(mlp_w(s(j (N - 1) / (n - 1))))         mm_rand_pos_w.mlp.{0,2}, patch column j
    Y = w * rms(Y)                                     mm_rand_llm_norm, w = std of the embeddings

with s(p)[2k] = sin(p / 10000^(2k/d)), s(p)[2k+1] = cos(p / 10000^(2k/d)). N is n for images without
tiles. The position MLPs run in fp32 whatever the model's dtype, and statistics of norms as well;
each result is rounded to the model's dtype before the next operation.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
# Our parameters, within `adapter.`, by their names.
OUR_NAMES = {
    "mm_rand_projector.model.0.weight": "linear_fc1.weight",
    "mm_rand_projector.model.0.bias": "linear_fc1.bias",
    "mm_rand_projector.model.2.weight": "linear_fc2.weight",
    "mm_rand_projector.model.2.bias": "linear_fc2.bias",
    "mm_rand_norm.weight": "output_norm.weight",
    "mm_rand_pos_h.mlp.0.weight": "positions.rows.0.weight",
    "mm_rand_pos_h.mlp.0.bias": "positions.rows.0.bias",
    "mm_rand_pos_h.mlp.2.weight": "positions.rows.2.weight",
    "mm_rand_pos_h.mlp.2.bias": "positions.rows.2.bias",
    "mm_rand_pos_w.mlp.0.weight": "positions.columns.0.weight",
    "mm_rand_pos_w.mlp.0.bias": "positions.columns.0.bias",
    "mm_rand_pos_w.mlp.2.weight": "positions.columns.2.weight",
    "mm_rand_pos_w.mlp.2.bias": "positions.columns.2.bias",
    "mm_rand_llm_norm.weight": "positions.last_norm.weight",
}


def random_weights(features: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights under their names, no two alike, large enough that every term counts."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = {}
    for name in OUR_NAMES:
        if "norm" in name:
            value = 1.0 + 0.3 * draw(width)
        elif name.endswith("bias"):
            value = 0.3 * draw(width)
        else:
            inputs = features if name.startswith("mm_rand_projector.model.0") else width
            value = draw(width, inputs) / inputs**0.5
        weights[name] = value.to(dtype)
    return weights


def vidi_tokens(
    weights: Mapping[str, Tensor], features: Tensor, grid: tuple[int, int], num_places: int
) -> Tensor:
    """Features [patches, v] of one image to tokens [patches, d], patch by patch, in their dtype."""
    dtype, (height, width) = features.dtype, grid
    tokens = F.gelu(_linear(features, weights, "mm_rand_projector.model.0"))
    tokens = weights["mm_rand_norm.weight"] * _rms(
        _linear(tokens, weights, "mm_rand_projector.model.2")
    )
    placed = []
    for patch, token in enumerate(tokens):
        i, j = divmod(patch, width)
        for axis, index, length in (("h", i, height), ("w", j, width)):
            place = index / (length - 1) * (num_places - 1) if length > 1 else 0.0
            wide = torch.promote_types(dtype, torch.float32)
            position = _sinusoid(place, tokens.shape[1]).to(wide)
            position = F.gelu(_linear(position, weights, f"mm_rand_pos_{axis}.mlp.0"))
            position = _linear(position, weights, f"mm_rand_pos_{axis}.mlp.2")
            token = token + _rms(position.to(dtype))
        placed.append(weights["mm_rand_llm_norm.weight"] * _rms(token))
    return torch.stack(placed)


def _linear(tokens: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    weight, bias = (weights[f"{name}.{part}"].to(tokens.dtype) for part in ("weight", "bias"))
    return F.linear(tokens, weight, bias)


def _rms(tokens: Tensor) -> Tensor:
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return (wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt()).to(tokens.dtype)


def _sinusoid(place: float, width: int) -> Tensor:
    channels = []
    for k in range(width // 2):
        angle = place / 10_000 ** (2 * k / width)
        channels += [math.sin(angle), math.cos(angle)]
    return torch.tensor(channels, dtype=torch.float64)
