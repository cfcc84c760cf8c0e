"""The vision encoder's attention core: every patch sees every patch of its image.

A thin wrapper around torch's scaled_dot_product_attention, which picks a flash kernel on CPU and
GPU alike. megatron-core's unfused core would materialize the scores. What attention a patch
receives, which no kernel tells, is computed beside it where it is asked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_dattn.models.patch_selection import attention_received


class BidirectionalCore(torch.nn.Module):
    """Attention without a mask over `[patches, images, heads, head_dim]`.

    Built and called as megatron-core builds and calls a `core_attention`; arguments that describe
    masks, packing or context parallelism have no meaning here.
    """

    def __init__(
        self, config: TransformerConfig, softmax_scale: float | None = None, **unused: Any
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self._received: list[Tensor] | None = None
        self._asking: int | None = None

    @contextmanager
    def recording(self, asking: int | None = None) -> Iterator[list[Tensor]]:
        """Takes note of the attention that patches receive from this rank's heads.

        Every forward pass inside adds one [images, patches] to the list, see `attention_received`;
        a recomputation after it adds none.

        Args:
            asking: only the attention of so many leading tokens counts; by default that of all.
        """
        self._received, self._asking = [], asking
        try:
            yield self._received
        finally:
            self._received = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """The attended values, [patches, images, heads * head_dim]."""
        # [patches, images, heads, head_dim] -> [images, heads, patches, head_dim]
        query, key, value = (states.permute(1, 2, 0, 3) for states in (query, key, value))
        if self._received is not None:
            asking = query[:, :, : self._asking]
            self._received.append(attention_received(asking, key, self.softmax_scale))
        out = F.scaled_dot_product_attention(query, key, value, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).flatten(2)
