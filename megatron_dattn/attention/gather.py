"""From all tokens to the tokens of a part, and back: what goes around the attention kernels.

Each function is one kernel on CUDA, by torch.compile; plain torch elsewhere. Between matrix
products and attention kernels an eager chain launches a kernel per operation, each of a few
microseconds, and the host can fall behind the device. On a CPU there is nothing to gain, and
compiling would call a C++ compiler. Results come back by a table that says for every token where
its row is, not by writing rows: a gather is a pointwise operation and joins the chain.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from megatron_dattn.attention.merge import alpha_merge, merge_dtype
from megatron_dattn.attention.plan.index import TokenIndex
from megatron_dattn.attention.positions import Rotary, apply_rotary
from megatron_dattn.errors import shortened

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_MOST_GRAPHS = 64
_failures: list[str] = []  # the first one ends compiling in this process


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, compiled once for CUDA tensors of any number of tokens.

    For pure functions of tensors [tokens, ...], or sequences of them, that nobody differentiates.
    Where the compiler does not work (no Triton, an old GPU) it says so once and goes on uncompiled.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if _failures or not _is_cuda(args):
            return function(*args, **kwargs)
        prepared: Any = tuple(_prepared(value) for value in args)
        try:
            return _compiled(function)(*prepared, **kwargs)
        except _compiler_error() as error:
            _give_up(error)
            return function(*args, **kwargs)

    return call


def take_rotated(tokens: TokenIndex, states: Tensor, rotary: Rotary) -> Tensor:
    """The listed tokens of queries or keys [N, heads, D], rotated, [tokens.length, heads, D] in
    their dtype.

    Args:
        rotary: tables of all N tokens.
    """
    if tokens.index is not None:
        return _rotated(states, rotary, tokens.index)
    cos, sin = (tokens.take(table) for table in rotary)
    return _rotated(tokens.take(states), (cos, sin), None)


@fused
def _rotated(states: Tensor, rotary: Rotary, index: Tensor | None) -> Tensor:
    cos, sin = rotary
    if index is not None:
        states, cos, sin = (tensor.index_select(0, index) for tensor in (states, cos, sin))
    return apply_rotary(states, (cos, sin))


@fused
def join_parts(
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    places: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Parts of one softmax as the softmax over all their keys, by `alpha_merge`.

    Args:
        outs: of each part's queries, [n, heads, D], any floating dtype.
        lses: their log-sum-exps, fp32 (float64 for float64) [n, heads].
        places: of each part's queries, `TokenIndex.places`.
        dtype: of the result; the parts are merged in float32 (float64 for float64).

    Returns:
        Output [N, heads, D] of `dtype` and log-sum-exp [N, heads] of all tokens: 0 and -inf in
        those that no part has.
    """
    joint: tuple[Tensor, Tensor] | None = None
    for out, lse, where in zip(outs, lses, places, strict=True):
        part = _spread(out, where, 0.0), _spread(lse, where, -torch.inf)
        joint = part if joint is None else alpha_merge(*joint, *part)
    assert joint is not None, "a softmax has a part"
    # Kernels give log-sum-exps [heads, n]: the output, too, would come in an order that pleases
    # both, and be copied for the projection.
    return joint[0].to(dtype).contiguous(), joint[1]


@fused
def add_query_gradients(
    grads: Sequence[Tensor],
    places: Sequence[Tensor | None],
    rotaries: Sequence[Rotary | None],
    dtype: torch.dtype,
) -> Tensor:
    """The gradient that parts send back to the queries they have taken, [N, heads, D] of `dtype`.

    Args:
        grads: of each part's tokens, [n, heads, D], any floating dtype, rotated or not.
        places: of those tokens, `TokenIndex.places`.
        rotaries: tables of all N tokens for parts that are rotated.
    """
    return _added(grads, places, rotaries, dtype)


@fused
def add_key_gradients(
    grads: Sequence[tuple[Tensor, Tensor]],
    places: Sequence[Tensor | None],
    rotaries: Sequence[Rotary | None],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The same of keys and of values, which are not rotated, [N, heads, D] of `dtype` each."""
    keys, values = zip(*grads, strict=True)
    no_rotaries = [None] * len(places)
    return _added(keys, places, rotaries, dtype), _added(values, places, no_rotaries, dtype)


def _added(
    grads: Sequence[Tensor],
    places: Sequence[Tensor | None],
    rotaries: Sequence[Rotary | None],
    dtype: torch.dtype,
) -> Tensor:
    total: Tensor | None = None
    for part_grad, where, rotary in zip(grads, places, rotaries, strict=True):
        grad = _spread(part_grad, where, 0.0).to(merge_dtype(part_grad.dtype))
        if rotary is not None:
            cos, sin = rotary
            grad = apply_rotary(grad, (cos, -sin))
        total = grad if total is None else total + grad
    assert total is not None, "a softmax has a part"
    return total.to(dtype)


def _spread(values: Tensor, places: Tensor | None, fill: float) -> Tensor:
    """Every token's row of `values` [n, ...], and `fill` for tokens that have none: [N, ...]."""
    if places is None:
        return values
    is_there = (places >= 0).view(-1, *(1,) * (values.dim() - 1))
    return torch.where(is_there, values.index_select(0, places.clamp(min=0)), fill)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Sizes are constants of a kernel, but for those that `_prepared` marks: with dynamic=True every
    # kernel would divide by the number of heads, which it does not know.
    # Graphs differ in which parts a pack has, in strides and under inference mode, which is more
    # than the 8 for one function, behind which torch would go on uncompiled.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, _MOST_GRAPHS)
    return torch.compile(function, dynamic=False)


def _prepared(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_prepared, value))
    if not isinstance(value, Tensor):
        return value
    # A graph for tensors with and one for those without gradient would be the same.
    value = value.detach()
    # Packs differ in their numbers of tokens, and each new size would be compiled.
    torch._dynamo.maybe_mark_dynamic(value, 0)
    return value


def _is_cuda(values: Any) -> bool:
    """Whether the first tensor is on a CUDA device."""
    for value in values:
        if isinstance(value, list | tuple):
            return _is_cuda(value)
        if isinstance(value, Tensor):
            return value.is_cuda
    return False


def _compiler_error() -> type[Exception]:
    return torch._dynamo.exc.TorchDynamoException


def _give_up(error: Exception) -> None:
    lines = str(error).strip().splitlines() or ["no message"]
    _failures.append(f"{type(error).__name__}: {shortened(lines[0], 200)}")
    logger.warning(
        "torch.compile does not work here, so attention launches more kernels: %s", _failures[0]
    )
