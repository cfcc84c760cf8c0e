"""Rotary positions of packed tokens: their ids, the cosine and sine tables, and the rotation.

The convention is the rotate-half one of Hugging Face and Megatron: channel i is paired with channel
i + D/2, and both halves of a table row repeat the same angles.
"""

import torch
from torch import Tensor

from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.layout import TokenLayout, TokenRun
from megatron_dattn.attention.plan.patches import num_rings, ring_of_patches
from megatron_dattn.attention.rotary_scaling import RotaryScaling

Rotary = tuple[Tensor, Tensor]  # cosine and sine, each [tokens, D]


def token_positions(layout: TokenLayout, config: AttentionConfig) -> Tensor:
    """Rotary position of every packed token, int64 [S]; padding and unpositioned tokens have 0."""
    positions = torch.zeros(layout.num_tokens, dtype=torch.int64)
    for sample in range(layout.num_samples):
        position = 0
        for run in layout.runs(sample):
            if not run.is_visual or config.positions.visual == "sequence":
                positions[run.start : run.end] = torch.arange(run.end - run.start) + position
            elif config.positions.visual == "ring":
                position = _place_rings(positions, run, layout, position)
                continue
            if not run.is_visual or config.positions.text == "gap":
                position += run.end - run.start
    return positions


def _place_rings(positions: Tensor, run: TokenRun, layout: TokenLayout, position: int) -> int:
    """Give every ring of the run's images the next id; the id that follows them all."""
    for index in run.images:
        start, end = layout.image_tokens[index]
        grid = layout.images[index].grid
        positions[start:end] = ring_of_patches(grid) + position
        position += num_rings(grid)
    return position


def rotary_tables(
    positions: Tensor,
    head_dim: int,
    base: float,
    device: torch.device | str = "cpu",
    scaling: RotaryScaling | None = None,
) -> Rotary:
    """Cosine and sine of every token's angles, float32 [S, head_dim] each.

    Angles are computed in float32 as pretrained language models did, whatever the model's dtype.
    Position 0 gives the identity.
    """
    if head_dim % 2:
        raise ValueError(f"rotary embeddings pair channels; head_dim {head_dim} is odd")
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / (base ** (channels / head_dim))
    if scaling is not None:
        frequencies = scaling.scale(frequencies)
    angles = positions.to(device=device, dtype=torch.float32).unsqueeze(-1) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(states: Tensor, rotary: Rotary) -> Tensor:
    """Rotate queries or keys [tokens, heads, D] by their tokens' angles; same dtype as `states`.

    A rotation keeps lengths, so its transpose, which a backward pass needs, is the rotation by the
    opposite angles: `apply_rotary(states, (cos, -sin))`.
    """
    cos, sin = (table.unsqueeze(-2) for table in rotary)
    first, second = states.chunk(2, dim=-1)
    quarter_turn = torch.cat((-second, first), dim=-1)
    return torch.addcmul(states * cos, quarter_turn, sin).to(states.dtype)
