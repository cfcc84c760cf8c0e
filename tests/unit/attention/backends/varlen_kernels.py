"""Stand-ins for the ragged flash kernels, which keep their conventions and compute as one would.

In whatever precision they are given: segments by boundaries, causal masks aligned at the bottom
right, windows, softcaps, log-sum-exps [heads, tokens] with +inf for tokens without keys, gradients
from the (out, lse) they are given. Those of the flash-attn packages take the signatures of
`flash_attn_releases.py`. The kernels themselves are tested in tests/gpu.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.unit.attention.backends.flash_attn_releases import FLASH_ATTN2, FLASH_ATTN3, Release


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


_COMMON = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale",
           "softcap")  # fmt: skip


def _take_call(given: dict[str, Any]) -> Call:
    """What all releases are told alike, in the order of `Call`; taken out of `given`."""
    cu_q, cu_k, max_q, max_k, scale, softcap = (given.pop(name) for name in _COMMON)
    causal = given.pop("causal") if "causal" in given else given.pop("is_causal")
    if "window_size" in given:
        left, right = given.pop("window_size")
    else:
        left, right = given.pop("window_size_left"), given.pop("window_size_right")
    return Call(cu_q, cu_k, max_q, max_k, scale, causal, left, right, softcap)


def _forward_of(given: dict[str, Any]) -> tuple[Tensor | None, ...]:
    call = _take_call(given)
    out, lse = forward(*(given.pop(name) for name in "qkv"), call)
    return out, lse, None, None


def _flash_attn3_forward_of(given: dict[str, Any]) -> tuple[Tensor | None, ...]:
    no_keys = len(given["k"]) == 0
    out, lse, *rest = _forward_of(given)
    return out, lse if no_keys else lse.nan_to_num(posinf=-torch.inf), *rest


def _backward_of(given: dict[str, Any]) -> Tensor:
    call = _take_call(given)
    tensors = [given.pop(name) for name in ("dout", "q", "k", "v", "out", "softmax_lse")]
    backward(*tensors, tuple(given.pop(name) for name in ("dq", "dk", "dv")), call)
    return torch.zeros_like(tensors[-1])


def _operation(signature: str, compute: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """A function of that signature. What it is given beyond what `compute` takes must be off."""
    bound = eval(f"lambda {signature}: locals()")
    defaults = bound(*[None] * (bound.__code__.co_argcount - len(bound.__defaults__ or ())))

    @wraps(bound)  # inspect.signature then answers with the lambda's
    def operation(*args: Any, **kwargs: Any) -> Any:
        given = bound(*args, **kwargs)
        result = compute(given)
        for name, value in given.items():
            assert value in (None, 0.0, defaults[name]), f"{name} is {value}"
        return result

    return operation


def flash_attn2(release: Release) -> SimpleNamespace:
    """The module flash_attn.flash_attn_interface."""
    return SimpleNamespace(
        _flash_attn_varlen_forward=_operation(release.forward, _forward_of),
        _flash_attn_varlen_backward=_operation(release.backward, _backward_of),
    )


def flash_attn3(release: Release) -> SimpleNamespace:
    """The module flash_attn_interface."""
    return SimpleNamespace(
        _flash_attn_forward=_operation(release.forward, _flash_attn3_forward_of),
        _flash_attn_backward=_operation(release.backward, _backward_of),
    )


MODULES = {
    **{f"flash_attn2 {name}": flash_attn2(release) for name, release in FLASH_ATTN2.items()},
    **{f"flash_attn3 {name}": flash_attn3(release) for name, release in FLASH_ATTN3.items()},
}
