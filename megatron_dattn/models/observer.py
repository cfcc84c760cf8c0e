"""Who may look at the attention while the model runs, and what is commonly asked of it.

An observer is an argument of the model's forward pass. Without one, the layers do nothing for it.
"""

from typing import Protocol

import torch
from torch import Tensor

from megatron_dattn.attention.attention_maps import ReportInputs, alpha_v


class AttentionObserver(Protocol):
    """Is shown what every layer of this rank's pipeline stage attends to images with.

    Under merge "cascade" that is the cross-attention of the layers that see images, and alpha_V has
    no meaning; elsewhere it is the self-attention of all layers.
    """

    def __call__(self, layer_number: int, query: Tensor, key: Tensor, inputs: ReportInputs) -> None:
        """
        Args:
            layer_number: in the whole decoder, from 1.
            query: of this rank's heads, as projected, without rotation, of all tokens or of the
                text tokens alone, [.., Hq, D].
            key: of all tokens, [S, Hk, D], or of the visual tokens that a cross-attention reads.
            inputs: how scores come from them, and which of them count.
        """


class AlphaMeter:
    """Mean alpha_V (equation 9) of this rank's heads over the text tokens that see an image.

    Sums on the device, without waiting for it. A layer that is shown the same tokens twice, as in
    full recomputation, counts them twice in both sums: the mean stays.
    """

    def __init__(self, num_layers: int, num_heads: int, device: torch.device | str) -> None:
        """
        Args:
            num_layers: of the whole decoder; layers of other pipeline stages stay at 0.
            num_heads: query heads of this rank.
        """
        self.alpha = torch.zeros(num_layers, num_heads, dtype=torch.float32, device=device)
        self.counts = torch.zeros(num_layers, dtype=torch.float32, device=device)

    def __call__(self, layer_number: int, query: Tensor, key: Tensor, inputs: ReportInputs) -> None:
        assert inputs.plan.merge != "cascade", "the configuration refuses it"
        weights = alpha_v(query, key, inputs)
        self.alpha[layer_number - 1] += weights.sum(0)
        self.counts[layer_number - 1] += inputs.plan.num_seeing
