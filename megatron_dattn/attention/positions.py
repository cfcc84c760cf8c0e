"""Rotary positions of packed tokens: their ids, the cosine and sine tables, and the rotation.

The convention is the rotate-half one of Hugging Face and Megatron: channel i is paired with channel
i + D/2, and both halves of a table row repeat the same angles.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.layout import TokenLayout, TokenRun
from megatron_dattn.attention.plan.patches import num_rings, ring_of_patches

Rotary = tuple[Tensor, Tensor]  # cosine and sine, each [tokens, D]


@dataclass(frozen=True)
class RotaryScaling:
    """How Llama 3.1 made a model that had been trained on short texts read long ones.

    What counts is how often a pair of channels turns over the length that was trained on. Pairs
    that turn often tell near tokens apart and stay as they are. Pairs that turn rarely are slowed
    down by a factor, so that long texts do not show them angles that they have never seen. Between
    the two the share of what stays grows with the number of turns. Source: Hugging Face's
    rope_type "llama3", whose names these are.
    """

    factor: float
    """How much slower pairs turn that turn less than `low_freq_factor` times."""
    low_freq_factor: float
    """Up to so many turns over the trained length pairs are slowed down by the whole factor."""
    high_freq_factor: float
    """From so many turns on pairs stay as they are."""
    original_max_position_embeddings: int
    """The length that was trained on, in tokens."""

    def scale(self, frequencies: Tensor) -> Tensor:
        """The frequencies that are used instead of these, in radians per token, float32 [D / 2]."""
        turns = self.original_max_position_embeddings / (2 * math.pi / frequencies)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies


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
