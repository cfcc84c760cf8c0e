"""Rotary positions for texts longer than those of the first training: a setting of the model.

Apart from `positions.py`, because settings are read and explained without torch.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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

    def scale(self, frequencies: "Tensor") -> "Tensor":
        """The frequencies that are used instead of these, in radians per token, float32 [D / 2]."""
        turns = self.original_max_position_embeddings / (2 * math.pi / frequencies)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies
