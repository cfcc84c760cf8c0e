"""From all tokens to the tokens of a part, and back: what goes around the attention kernels.

Each function is one kernel on CUDA (`fused.py`). Results come back by a table that says for every
token where its row is, not by writing rows: a gather is a pointwise operation and joins the chain.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dattn.attention.fused import fused
from megatron_dattn.attention.merge import alpha_merge, merge_dtype
from megatron_dattn.attention.plan.index import TokenIndex
from megatron_dattn.attention.positions import Rotary, apply_rotary


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
        outs: of each part's queries, [n, heads, D].
        lses: their log-sum-exps, [n, heads].
        places: of each part's queries, `TokenIndex.places`.
        dtype: of the result; the parts are merged in float32 (float64 for float64).

    Returns:
        Output [N, heads, D] and log-sum-exp [N, heads] of all tokens: 0 and -inf in those that no
        part has.
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
        grads: of each part's tokens, [n, heads, D], rotated or not.
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
