"""Stand-ins for the ragged flash kernels, which keep their conventions and compute as one would.

In whatever precision they are given: segments by boundaries, causal masks aligned at the bottom
right, windows, softcaps, log-sum-exps [heads, tokens] with +inf for tokens without keys, gradients
from the (out, lse) they are given. Each family has its own signatures and its own way of returning
gradients. The kernels themselves are tested in tests/gpu.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor


@dataclass
class Call:
    """The arguments that all kernels share."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    scale: float
    causal: bool
    left: int = -1
    right: int = -1
    softcap: float = 0.0

    def check(self, query: Tensor, *keys: Tensor) -> None:
        sides = [(self.cu_q, query, self.max_q)]
        sides += [(self.cu_k, tokens, self.max_k) for tokens in keys]
        for cu, tokens, most in sides:
            assert cu.dtype == torch.int32
            assert cu[-1] == tokens.shape[0]
            assert cu.diff().max() == most
            assert tokens.stride(-1) == 1

    def segments(self) -> Iterator[tuple[slice, slice]]:
        bounds = zip(self.cu_q[:-1], self.cu_q[1:], self.cu_k[:-1], self.cu_k[1:], strict=True)
        for a, b, c, d in bounds:
            yield slice(a, b), slice(c, d)

    def scores(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | float]:
        """[heads, queries, keys], and their derivative by the products of query and key."""
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * self.scale
        slope: Tensor | float = self.scale
        if self.softcap > 0:
            share = torch.tanh(scores / self.softcap)
            scores, slope = self.softcap * share, self.scale * (1 - share**2)
        ones, last = torch.ones(scores.shape[-2:], dtype=torch.bool), len(key) - len(query)
        if self.causal:
            assert self.right in (-1, 0)
            scores = scores.masked_fill(ones.triu(1 + last), -torch.inf)
        if self.left >= 0:
            scores = scores.masked_fill(ones.tril(last - self.left - 1), -torch.inf)
        return scores, slope


def forward(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    call.check(query, key, value)
    group = query.shape[1] // key.shape[1]
    out = torch.zeros_like(query)
    lse = query.new_full((query.shape[1], query.shape[0]), torch.inf)
    for q, k in call.segments():
        scores, _ = call.scores(query[q], key[k])
        if scores.shape[-1]:
            values = value[k].repeat_interleave(group, dim=1)
            out[q] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
            lse[:, q] = scores.logsumexp(-1)
    return out, lse


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor], call: Call,
) -> None:  # fmt: skip
    assert lse.is_contiguous()
    assert lse.shape == (query.shape[1], query.shape[0])
    call.check(query, key, value)
    group = query.shape[1] // key.shape[1]
    for grad, of in zip(grads, (query, key, value), strict=True):
        assert grad.is_contiguous()
        assert grad.shape == of.shape
        grad.fill_(torch.nan)  # nothing may rely on what was there
    for q, k in call.segments():
        keys, values = (x[k].repeat_interleave(group, dim=1) for x in (key, value))
        scores, slope = call.scores(query[q], key[k])
        probabilities = (scores - lse[:, q, None]).exp()
        grad_p = torch.einsum("qhd,khd->hqk", grad_out[q], values)
        centre = (grad_out[q] * out[q]).sum(-1).T.unsqueeze(-1)
        grad_s = probabilities * (grad_p - centre) * slope
        grads[0][q] = torch.einsum("hqk,khd->qhd", grad_s, keys)
        grad_k = torch.einsum("hqk,qhd->khd", grad_s, query[q])
        grad_v = torch.einsum("hqk,qhd->khd", probabilities, grad_out[q])
        for target, grad in zip(grads[1:], (grad_k, grad_v), strict=True):
            target[k] = grad.unflatten(1, (-1, group)).sum(2)


def aten_forward(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    dropout: float, causal: bool, debug: bool, *, scale: float,
    window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """torch.ops.aten._flash_attention_forward."""
    assert (dropout, debug) == (0.0, False)
    sides = (-1 if side is None else side for side in (window_size_left, window_size_right))
    call = Call(cu_q, cu_k, max_q, max_k, scale, causal, *sides)
    return *forward(query, key, value, call), None, None, None


def aten_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout: float, causal: bool,
    rng_state: Tensor, unused: Tensor, *, scale: float,
    window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """torch.ops.aten._flash_attention_backward."""
    assert (dropout, rng_state.dtype) == (0.0, torch.uint64)
    sides = (-1 if side is None else side for side in (window_size_left, window_size_right))
    grads = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value))
    call = Call(cu_q, cu_k, max_q, max_k, scale, causal, *sides)
    backward(grad_out, query, key, value, out, lse, grads, call)
    return grads


def flash_attn2_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, return_softmax: bool = False,
    block_table: Tensor | None = None, leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None, zero_tensors: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """flash_attn.flash_attn_interface._flash_attn_varlen_forward of 2.7 and 2.8."""
    assert (dropout_p, alibi_slopes, return_softmax) == (0.0, None, False)
    call = Call(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
                window_size_left, window_size_right, softcap)  # fmt: skip
    return *forward(q, k, v, call), None, None


def flash_attn2_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
    deterministic: bool, rng_state: Tensor | None = None, zero_tensors: bool = False,
) -> Tensor:  # fmt: skip
    """flash_attn.flash_attn_interface._flash_attn_varlen_backward of 2.7 and 2.8."""
    assert (dropout_p, alibi_slopes, deterministic) == (0.0, None, False)
    call = Call(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
                window_size_left, window_size_right, softcap)  # fmt: skip
    backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), call)
    return torch.zeros_like(softmax_lse)


def flash_attn3_forward(
    q: Tensor, k: Tensor, v: Tensor, k_new: Tensor | None = None, v_new: Tensor | None = None,
    qv: Tensor | None = None, out_: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None, seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size_left: int = -1,
    window_size_right: int = -1, attention_chunk: int = 0, softcap: float = 0.0,
    num_splits: int = 1, pack_gqa: bool | None = None, sm_margin: int = 0,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """flash_attn_interface._flash_attn_forward, its paged-cache arguments left out."""
    assert cu_seqlens_q is not None
    assert cu_seqlens_k is not None
    assert max_seqlen_q is not None
    assert max_seqlen_k is not None
    assert softmax_scale is not None
    call = Call(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
                window_size_left, window_size_right, softcap)  # fmt: skip
    out, lse = forward(q, k, v, call)
    return out, lse if len(k) == 0 else lse.nan_to_num(posinf=-torch.inf), None, None


def flash_attn3_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None, max_seqlen_q: int = 0, max_seqlen_k: int = 0,
    dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None,
    softmax_scale: float = 1.0, is_causal: bool = False, window_size_left: int = -1,
    window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:  # fmt: skip
    """flash_attn_interface._flash_attn_backward."""
    assert dq is not None
    assert dk is not None
    assert dv is not None
    call = Call(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, is_causal,
                window_size_left, window_size_right, softcap)  # fmt: skip
    backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), call)
    return torch.zeros_like(softmax_lse)


def older_flash_attn3_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, causal: bool,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """With the window as one argument."""
    return flash_attn3_forward(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, softmax_scale=softmax_scale, causal=causal, softcap=softcap,
        window_size_left=window_size[0], window_size_right=window_size[1],
    )  # fmt: skip


def older_flash_attn3_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None, max_seqlen_q: int = 0, max_seqlen_k: int = 0,
    dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None,
    softmax_scale: float = 1.0, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, deterministic: bool = False,
) -> Tensor:  # fmt: skip
    """With the window as one argument, and the causal mask under another name."""
    return flash_attn3_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, None, None, max_seqlen_q,
        max_seqlen_k, dq, dk, dv, softmax_scale, causal, *window_size, softcap, deterministic,
    )  # fmt: skip


FLASH_ATTN2 = SimpleNamespace(
    _flash_attn_varlen_forward=flash_attn2_forward,
    _flash_attn_varlen_backward=flash_attn2_backward,
)
FLASH_ATTN3 = SimpleNamespace(
    _flash_attn_forward=flash_attn3_forward, _flash_attn_backward=flash_attn3_backward
)
OLDER_FLASH_ATTN3 = SimpleNamespace(
    _flash_attn_forward=older_flash_attn3_forward, _flash_attn_backward=older_flash_attn3_backward
)
