"""Attention by torch's flash kernel for CPUs: no score matrix, grouped heads without copies.

Two conventions of the kernel matter here. Its causal mask is aligned at the top left, which is the
same as ours because causal segments are square. An empty query or key batch kills the process; a
part holds no empty segments, so none arises.
"""

import torch
from torch import Tensor

from megatron_dattn.attention.backends.dense import DenseBackend

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuFlashBackend(DenseBackend):
    name = "cpu_flash"

    def unsupported(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None if device.type == "cpu" else f"it runs on a CPU, not on {device.type}"

    def dense_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        return _forward(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)

    def dense_backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        bias: Tensor | None,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(
            grad_out, query, key, value, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
