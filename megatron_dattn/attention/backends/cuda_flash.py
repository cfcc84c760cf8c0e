"""Attention by the variable-length flash kernel that ships inside torch for CUDA."""

import torch
from torch import Tensor

from megatron_dattn.attention.backends.varlen import (
    RaggedScores,
    VarlenBackend,
    unsupported_tensors,
)

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


class CudaFlashBackend(VarlenBackend):
    name = "cuda_flash"

    def unsupported(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        softcap: float | None = None,
    ) -> str | None:
        if device.type == "cuda" and not torch.backends.cuda.is_flash_attention_available():
            return "this build of torch has no flash attention"
        reason = unsupported_tensors(device, dtype, head_dim, capability=8)
        if reason is None and softcap is not None:
            return "its kernel has no softcap"
        return reason

    def varlen_forward(
        self, query: Tensor, key: Tensor, value: Tensor, scores: RaggedScores
    ) -> tuple[Tensor, Tensor]:
        assert scores.function.softcap is None, "select_backend refuses a softcap by name"
        out, lse, *_ = _forward(
            query,
            key,
            value,
            *_segments(scores),
            0.0,
            scores.causal,
            False,
            scale=scores.function.scale,
            **_window(scores),
        )
        return out, lse

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
        assert scores.function.softcap is None, "select_backend refuses a softcap by name"
        random_state = torch.empty(2, dtype=torch.uint64, device=query.device)
        return _backward(
            grad_out,
            query,
            key,
            value,
            out,
            lse,
            *_segments(scores),
            0.0,
            scores.causal,
            random_state,  # read only when there is dropout
            random_state,
            scale=scores.function.scale,
            **_window(scores),
        )


def _segments(scores: RaggedScores) -> tuple[Tensor, Tensor, int, int]:
    return (
        scores.query_cu_seqlens,
        scores.key_cu_seqlens,
        scores.longest_query,
        scores.longest_key,
    )


def _window(scores: RaggedScores) -> dict[str, int]:
    """Left out where there is none: this kernel has no number that says so."""
    left, right = scores.window_sides
    return {} if left < 0 else {"window_size_left": left, "window_size_right": right}
