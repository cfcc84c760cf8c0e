"""Attention by torch's flash kernel for CPUs: no score matrix, grouped heads without copies.

Three conventions of the kernel matter here. Its causal mask is aligned at the top left, which is
the same as ours because causal segments are square. An empty query or key batch kills the process;
padded batches hold no empty segments, so none arises. It knows no window: batches longer than the
window carry a mask of width x width.
"""

import torch
from torch import Tensor

from megatron_dattn.attention.backends.dense import DenseBackend, DenseScores
from megatron_dattn.attention.plan.padding import PaddedBatch

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# The BF16 backward pass is slower than the float32 one on segments of 64 tokens, and faster on
# those of 256; the border lies between.
_MIN_BF16_WIDTH = 128


class CpuFlashBackend(DenseBackend):
    name = "cpu_flash"

    def computing_dtype(self, dtype: torch.dtype, batch: PaddedBatch) -> torch.dtype:
        narrowest = min(batch.queries.width, batch.keys.width)
        if dtype == torch.bfloat16 and narrowest >= _MIN_BF16_WIDTH:
            return dtype
        return super().computing_dtype(dtype, batch)

    def decoding_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype  # all keys in float32 would be copied for each token

    def unsupported(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        softcap: float | None = None,
    ) -> str | None:
        if device.type != "cpu":
            return f"it runs on a CPU, not on {device.type}"
        return None if softcap is None else "its kernel has no softcap"

    def dense_forward(
        self, query: Tensor, key: Tensor, value: Tensor, scores: DenseScores
    ) -> tuple[Tensor, Tensor]:
        mask, causal = _mask(query, scores)
        group = _foldable_group(query, key, scores.causal)
        out, lse = _forward(
            _fold(query, group), key, value, 0.0, causal, attn_mask=mask,
            scale=scores.function.scale,
        )  # fmt: skip
        return _unfold(out, group), _unfold(lse, group)

    def dense_backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        scores: DenseScores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mask, causal = _mask(query, scores)
        group = _foldable_group(query, key, scores.causal)
        do, q, o, s = (_fold(tokens, group) for tokens in (grad_out, query, out, lse))
        dq, dk, dv = _backward(
            do, q, key, value, o, s, 0.0, causal, attn_mask=mask, scale=scores.function.scale
        )
        return _unfold(dq, group), dk, dv


def _foldable_group(query: Tensor, key: Tensor, causal: bool) -> int:
    """How many query heads may be the rows of one; 1 for none.

    Where every query sees every key, the heads of a group differ in nothing but their row. One tall
    head reads keys and values once instead of once per head, which is worth it in BF16 and not in
    float32. The backward kernel gives whole heads to its threads, so there must be one left for
    each.
    """
    heads = key.shape[0] * key.shape[1]
    if causal or query.dtype != torch.bfloat16 or heads < torch.get_num_threads():
        return 1
    return query.shape[1] // key.shape[1]


def _fold(tokens: Tensor, group: int) -> Tensor:
    """[batch, heads, width, ...] -> [batch, heads / group, group * width, ...]."""
    return tokens if group == 1 else tokens.unflatten(1, (-1, group)).flatten(2, 3)


def _unfold(tokens: Tensor, group: int) -> Tensor:
    """The inverse of `_fold`."""
    return tokens if group == 1 else tokens.unflatten(2, (group, -1)).flatten(1, 2)


def _mask(query: Tensor, scores: DenseScores) -> tuple[Tensor | None, bool]:
    """The mask to add to the scores, and whether the kernel's own causal mask is still needed."""
    assert scores.function.softcap is None, "select_backend refuses a softcap by name"
    width = query.shape[2]
    if scores.window is None or scores.window >= width:
        return scores.bias, scores.causal
    hidden = scores.hidden(width, query.device)
    assert scores.bias is None
    assert hidden is not None
    mask = query.new_zeros(width, width).masked_fill_(hidden, -torch.inf)
    return mask.expand(query.shape[0], 1, width, width), False
