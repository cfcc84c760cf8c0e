"""Attention by the variable-length flash kernel that ships inside torch for CUDA.

Nothing is padded: the kernel takes segment boundaries. Its causal mask is aligned at the bottom
right, which is the same as ours because causal segments are square. Where a row has no key it
reports a log-sum-exp of +inf; we say -inf, the value that merges to nothing.

Without a causal mask the order of queries inside a segment is free, so the query heads that share a
key head become further query rows: the kernel then sees as many query as key heads, and sums key
and value gradients over the group in float32 itself instead of in half precision afterwards.
"""

import torch
from torch import Tensor

from megatron_dattn.attention.parts import Part

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward

_DTYPES = (torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256
_MIN_CAPABILITY = (8, 0)


class CudaFlashBackend:
    name = "cuda_flash"

    def unsupported(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        softcap: float | None = None,
    ) -> str | None:
        if device.type != "cuda":
            return f"it needs a CUDA device, not {device.type}"
        if not torch.backends.cuda.is_flash_attention_available():
            return "this build of torch has no flash attention"
        if torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
            return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
        if dtype not in _DTYPES:
            return f"it computes in bfloat16 or float16, not {dtype}"
        if head_dim > _MAX_HEAD_DIM or head_dim % 8:
            return f"head_dim {head_dim} is not a multiple of 8 up to {_MAX_HEAD_DIM}"
        return None if softcap is None else "its kernel has no softcap"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        part: Part,
        scale: float,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert softcap is None, "select_backend refuses a softcap by name"
        group = _foldable_group(query, key, part)
        out, lse, *_ = _forward(
            _fold(query, group),
            key,
            value,
            part.query_cu_seqlens * group,
            part.key_cu_seqlens,
            max(part.query_lengths) * group,
            max(part.key_lengths),
            0.0,
            part.causal,
            False,
            scale=scale,
            **_window(part),
        )
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)
        return _unfold(out, group), _unfold(lse.T.unsqueeze(-1), group).squeeze(-1)

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
        assert softcap is None, "select_backend refuses a softcap by name"
        group = _foldable_group(query, key, part)
        random_state = torch.empty(2, dtype=torch.uint64, device=query.device)
        grad_query, grad_key, grad_value = _backward(
            _fold(grad_out, group),
            _fold(query, group),
            key,
            value,
            _fold(out, group),
            _fold(lse.unsqueeze(-1), group).squeeze(-1).T.contiguous(),
            part.query_cu_seqlens * group,
            part.key_cu_seqlens,
            max(part.query_lengths) * group,
            max(part.key_lengths),
            0.0,
            part.causal,
            random_state,  # read only when there is dropout
            random_state,
            scale=scale,
            **_window(part),
        )
        return _unfold(grad_query, group), grad_key, grad_value


def _window(part: Part) -> dict[str, int]:
    """Keys that a query sees before and behind its own place."""
    return (
        {} if part.window is None else {"window_size_left": part.window - 1, "window_size_right": 0}
    )


def _foldable_group(query: Tensor, key: Tensor, part: Part) -> int:
    """Query heads per key head to turn into rows; 1 under a causal mask, where order counts."""
    return 1 if part.causal else query.shape[1] // key.shape[1]


def _fold(rows: Tensor, group: int) -> Tensor:
    """[N, Hk * group, D] to [N * group, Hk, D]; segments stay together."""
    if group == 1:
        return rows
    return rows.unflatten(1, (-1, group)).transpose(1, 2).flatten(0, 1)


def _unfold(rows: Tensor, group: int) -> Tensor:
    """The inverse of `_fold`."""
    if group == 1:
        return rows
    return rows.unflatten(0, (-1, group)).transpose(1, 2).flatten(1, 2)
