"""What every attention backend offers: the forward and the raw backward of one part."""

from typing import Protocol

import torch
from torch import Tensor

from megatron_dattn.attention.plan.parts import Part


class Backend(Protocol):
    """Softmax attention over the segments of one part, its sliding window included.

    Tensors hold the part's own tokens: queries [Nq, Hq, D], keys and values [Nk, Hk, D] with Hq a
    multiple of Hk, segment after segment as `part` lists them.
    """

    name: str

    def unsupported(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        softcap: float | None = None,
    ) -> str | None:
        """Why this backend cannot run such tensors; None if it can."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        part: Part,
        scale: float,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Output [Nq, Hq, D], in the input's dtype or a wider one, and the natural-log
        log-sum-exp of the scores [Nq, Hq], float32 (float64 for float64).

        Scores are scaled, then, with a softcap c, become c * tanh(score / c).
        """
        ...

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        part: Part,
        scale: float,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value for probabilities exp(score - lse).

        `out` and `lse` may belong to a softmax over more keys than this part's: the result is then
        the part's share of that softmax's gradient.
        """
        ...
