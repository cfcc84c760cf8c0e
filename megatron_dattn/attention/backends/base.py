"""What every attention backend offers: the forward and the raw backward of one part."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_dattn.attention.plan.parts import Part


@dataclass(frozen=True)
class ScoreFunction:
    """The score of a query q and a key k: s = scale * q.k, or, with a softcap c, c * tanh(s / c).

    One for all parts of a layer. Which pairs have a score, a causal mask and a sliding window
    included, differs between parts and is said by each `Part`.
    """

    scale: float
    softcap: float | None = None


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
        """The reason why this backend cannot run such tensors; None if it can."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        part: Part,
        score_function: ScoreFunction,
    ) -> tuple[Tensor, Tensor]:
        """Output [Nq, Hq, D], in the input's dtype or a wider one, and the natural-log
        log-sum-exp of the scores [Nq, Hq], float32 (float64 for float64)."""
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
        score_function: ScoreFunction,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query [Nq, Hq, D], key and value [Nk, Hk, D] for probabilities
        exp(score - lse), in the inputs' dtype or a wider one.

        `out` and `lse` may belong to a softmax over more keys than this part's: the result is then
        the part's share of that softmax's gradient.
        """
        ...
