"""Decomposed attention over the packed rows of a micro-batch: D-Attn, S-Attn and what lies between.

`decomposed_attention` is the whole operation: visual rows output their own value (equation 2) and
the others attend part by part, merged by alpha-weighting (equation 7).

The gradient needs care. Flash kernels return the log-sum-exp S but ignore its gradient, so autograd
through sigmoid(S_V - S_T) would give wrong query and key gradients without a word. But the merged
result IS one softmax over all keys, and a flash backward only needs that softmax's output and
log-sum-exp: it recomputes each probability as exp(score - S). Given the MERGED pair, the backward
of each part yields exactly its columns of the joint gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dattn.attention.backends.base import Backend
from megatron_dattn.attention.merge import alpha_merge, merge_dtype
from megatron_dattn.attention.parts import AttentionPlan, Part
from megatron_dattn.attention.positions import Rotary, apply_rotary


def decomposed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    rotary: Rotary,
    *,
    scale: float,
    backend: Backend,
) -> Tensor:
    """Attention output of every packed row, [S, Hq, D], before the output projection.

    `query` [S, Hq, D], `key` and `value` [S, Hk, D] are as projected, without rotation; Hq is a
    multiple of Hk. `rotary` holds the tables of all S rows. Rows that see nothing (padding) give
    zero, or their own value where visual rows do, and send no gradient to other rows.
    """
    scored = attend_scored_rows(
        query[plan.num_diagonal_rows :], key, value, plan, rotary, scale=scale, backend=backend
    )
    if plan.num_diagonal_rows == 0:
        return scored
    diagonal = diagonal_attention(value[: plan.num_diagonal_rows], query.shape[1])
    return torch.cat((diagonal, scored))


def attend_scored_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    rotary: Rotary,
    *,
    scale: float,
    backend: Backend,
) -> Tensor:
    """Attention output of the rows that have scores, [plan.num_scored_rows, Hq, D].

    For models that project no query of diagonal rows: `query` holds the scored rows alone, `key`,
    `value` and `rotary` all S rows.
    """
    _check_shapes(query, key, value, plan)
    cos, sin = rotary
    return _MergedAttention.apply(query, key, value, cos, sin, plan, scale, backend)


def diagonal_attention(value: Tensor, num_query_heads: int) -> Tensor:
    """Equation 2: softmax over oneself is 1, so each head outputs its value. [rows, Hq, D]."""
    group = num_query_heads // value.shape[1]
    return value if group == 1 else value.repeat_interleave(group, dim=1)


class _MergedAttention(torch.autograd.Function):
    """All parts of a plan, merged; its backward passes the merged (out, lse) to every part."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        plan: AttentionPlan,
        scale: float,
        backend: Backend,
    ) -> Tensor:
        out = query.new_zeros(query.shape, dtype=_sum_dtype(query, plan))
        lse = query.new_full(query.shape[:2], -torch.inf, dtype=merge_dtype(query.dtype))
        for part in plan.parts:
            q, k, v = _read(part, query, key, value, (cos, sin), plan)
            part_out, part_lse = backend.forward(q, k, v, part, scale)
            rows = part.query_rows
            if part is not plan.parts[0]:
                part_out, part_lse = alpha_merge(rows.take(out), rows.take(lse), part_out, part_lse)
            rows.put(out, part_out)
            rows.put(lse, part_lse)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, cos, sin, out, lse)
        ctx.plan, ctx.scale, ctx.backend = plan, scale, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, cos, sin, out, lse = ctx.saved_tensors
        plan: AttentionPlan = ctx.plan
        grad_query = torch.zeros_like(query, dtype=_sum_dtype(query, plan))
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for part in plan.parts:
            rows = part.query_rows
            q, k, v = _read(part, query, key, value, (cos, sin), plan)
            dq, dk, dv = ctx.backend.backward(
                rows.take(grad_out), q, k, v, rows.take(out), rows.take(lse), part, ctx.scale
            )
            if part.rotary:
                query_rotary, key_rotary = _rotary_of(part, (cos, -sin), plan)
                dq, dk = apply_rotary(dq, query_rotary), apply_rotary(dk, key_rotary)
            rows.add(grad_query, dq)
            part.key_rows.add(grad_key, dk)
            part.key_rows.add(grad_value, dv)
        return grad_query.to(query.dtype), grad_key, grad_value, None, None, None, None, None


def _sum_dtype(query: Tensor, plan: AttentionPlan) -> torch.dtype:
    """Several parts add up in the merge's precision; the result of a single one is final."""
    return merge_dtype(query.dtype) if len(plan.parts) > 1 else query.dtype


def _read(
    part: Part, query: Tensor, key: Tensor, value: Tensor, rotary: Rotary, plan: AttentionPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """The part's own rows, rotated if its scores are; backward repeats this to save memory."""
    q, k, v = part.query_rows.take(query), part.key_rows.take(key), part.key_rows.take(value)
    if part.rotary:
        query_rotary, key_rotary = _rotary_of(part, rotary, plan)
        q, k = apply_rotary(q, query_rotary), apply_rotary(k, key_rotary)
    return q, k, v


def _rotary_of(part: Part, rotary: Rotary, plan: AttentionPlan) -> tuple[Rotary, Rotary]:
    """Tables of the part's queries and of its keys."""
    cos, sin = rotary
    first, _ = plan.scored_rows
    query_rotary = part.query_rows.take(cos[first:]), part.query_rows.take(sin[first:])
    return query_rotary, (part.key_rows.take(cos), part.key_rows.take(sin))


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> None:
    expected = (plan.num_scored_rows, plan.num_rows, plan.num_rows)
    actual = (query.shape[0], key.shape[0], value.shape[0])
    if actual != expected:
        raise ValueError(f"query, key and value have {actual} rows; the plan is for {expected}")
    if query.shape[1] % key.shape[1] or key.shape != value.shape:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} "
            "do not form groups of query heads over equal key and value heads"
        )
