"""Who may look at the attention while the model runs, and what is commonly asked of it.

An observer is an argument of the model's forward pass. Without one, the layers do nothing for it.
"""

from typing import Protocol

import torch
from torch import Tensor

from megatron_dattn.attention import Scoring, visual_weight


class AttentionObserver(Protocol):
    """Is shown what every layer of this rank's pipeline stage attends with."""

    def __call__(self, layer_number: int, query: Tensor, key: Tensor, scoring: Scoring) -> None:
        """
        Args:
            layer_number: in the whole decoder, from 1.
            query: of this rank's heads, as projected, without rotation, of all rows or of the text
                rows alone, [.., Hq, D].
            key: of all rows, [S, Hk, D].
            scoring: how scores come from them.
        """


class VisualWeightMeter:
    """Mean alpha_V (equation 9) of this rank's heads over the text rows that see an image.

    Sums on the device, without waiting for it. A layer that is shown the same rows twice, as in
    full recomputation, counts them twice in both sums: the mean stays.
    """

    def __init__(self, num_layers: int, num_heads: int, device: torch.device | str) -> None:
        """
        Args:
            num_layers: of the whole decoder; layers of other pipeline stages stay at 0.
            num_heads: query heads of this rank.
        """
        self.weights = torch.zeros(num_layers, num_heads, dtype=torch.float32, device=device)
        self.rows = torch.zeros(num_layers, dtype=torch.float32, device=device)

    def __call__(self, layer_number: int, query: Tensor, key: Tensor, scoring: Scoring) -> None:
        weights = visual_weight(query, key, scoring)
        self.weights[layer_number - 1] += weights.sum(0)
        self.rows[layer_number - 1] += scoring.plan.num_seeing
