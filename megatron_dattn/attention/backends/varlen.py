"""The common frame of backends whose kernel takes ragged segments and grouped heads.

Nothing is padded or copied: such a kernel takes segment boundaries, and fewer key than query heads.
Its causal mask is aligned at the bottom right, which is the same as ours because causal segments
are square. Where a token has no key it reports a log-sum-exp of +inf (one of them -inf, unless
there is no key at all); we say -inf, the value that merges to nothing.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dattn.attention.backends.base import Backend, ScoreFunction
from megatron_dattn.attention.plan.parts import Part

_DTYPES = (torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class RaggedScores:
    """The segments of one call, and how its scores come about."""

    query_cu_seqlens: Tensor  # int32 [segments + 1]
    key_cu_seqlens: Tensor
    longest_query: int
    longest_key: int
    function: ScoreFunction
    causal: bool
    window: int | None  # in a causal part: a query sees this many keys, itself included

    @property
    def window_sides(self) -> tuple[int, int]:
        """Keys that a query sees before and behind its own place; -1 for all."""
        return (-1, -1) if self.window is None else (self.window - 1, 0)


class VarlenBackend(Backend, ABC):
    """Runs `varlen_forward` and `varlen_backward` over a part's tokens.

    Tokens are [N, heads, D], log-sum-exps [heads, N] in float32.
    """

    @abstractmethod
    def varlen_forward(
        self, query: Tensor, key: Tensor, value: Tensor, scores: RaggedScores
    ) -> tuple[Tensor, Tensor]:
        """Output [Nq, heads, D] and log-sum-exp [heads, Nq], float32, as the kernel gives them."""

    @abstractmethod
    def varlen_backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        scores: RaggedScores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, [N, heads, D] each, of their dtype; `lse` float32
        [heads, Nq]."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        part: Part,
        score_function: ScoreFunction,
    ) -> tuple[Tensor, Tensor]:
        out, lse = self.varlen_forward(query, key, value, _ragged_scores(part, score_function))
        # One kernel, where a comparison and a masked_fill are two. A NaN stays: it is to be seen.
        lse = lse.nan_to_num(torch.nan, posinf=-torch.inf, neginf=-torch.inf)
        return out, lse.T

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
        scores = _ragged_scores(part, score_function)
        return self.varlen_backward(grad_out, query, key, value, out, lse.T.contiguous(), scores)


def unsupported_tensors(
    device: torch.device, dtype: torch.dtype, head_dim: int, capability: int
) -> str | None:
    """The reason why kernels of this family cannot run such tensors; None if they can.

    Args:
        capability: the oldest major compute capability that has the kernel.
    """
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if torch.cuda.get_device_capability(device)[0] < capability:
        name = torch.cuda.get_device_name(device)
        return f"{name} is older than compute capability {capability}.0"
    if dtype not in _DTYPES:
        return f"it computes in bfloat16 or float16, not {dtype}"
    if head_dim > _MAX_HEAD_DIM or head_dim % 8:
        return f"head_dim {head_dim} is not a multiple of 8 up to {_MAX_HEAD_DIM}"
    return None


def empty_gradients(*inputs: Tensor) -> list[Tensor]:
    """Contiguous room for a kernel that writes the gradients of its inputs, of any shape and dtype,
    in place."""
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]


def _ragged_scores(part: Part, function: ScoreFunction) -> RaggedScores:
    return RaggedScores(
        query_cu_seqlens=part.query_cu_seqlens,
        key_cu_seqlens=part.key_cu_seqlens,
        longest_query=max(part.query_lengths),
        longest_key=max(part.key_lengths),
        function=function,
        causal=part.causal,
        window=part.window,
    )
