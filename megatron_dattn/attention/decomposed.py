"""Decomposed attention over the packed tokens of a micro-batch: D-Attn, S-Attn and what lies
between.

`decomposed_attention` is the whole operation: visual tokens output their own value (equation 2) and
the others attend part by part, merged by alpha-weighting (equation 7) or as the plan says.

The gradient needs care. Flash kernels return the log-sum-exp S but ignore its gradient, so autograd
through sigmoid(S_V - S_T) would give wrong query and key gradients without a word. But the merged
result IS one softmax over all keys, and a flash backward only needs that softmax's output and
log-sum-exp: it recomputes each probability as exp(score - S). Given the MERGED pair, the backward
of each part yields exactly its columns of the joint gradient. A merge that leaves T2V a softmax of
its own has two such pairs and no weight that depends on S, so autograd joins them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dattn.attention.backends.base import Backend, ScoreFunction
from megatron_dattn.attention.gather import (
    add_key_gradients,
    add_query_gradients,
    join_parts,
    take_rotated,
)
from megatron_dattn.attention.merge import merge_dtype, weighted_merge
from megatron_dattn.attention.plan.parts import AttentionPlan, Part
from megatron_dattn.attention.positions import Rotary, apply_rotary


def decomposed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    rotary: Rotary,
    *,
    score_function: ScoreFunction,
    backend: Backend,
    gate: Tensor | None = None,
    head_mask: Tensor | None = None,
) -> Tensor:
    """Attention output of every packed token, [S, Hq, D] of the query's dtype, not yet projected.

    `query` [S, Hq, D], `key` and `value` [S, Hk, D] are as projected, without rotation, all of one
    floating dtype; Hq is a multiple of Hk. `rotary` holds the tables of all S tokens, fp32 [S, D]
    each. `gate` [Hq] or [1], of any floating dtype, belongs to the merges "tanh" and "sigmoid".
    `head_mask`, fp32 [Hk] of ones and zeros, masks visual tokens in key heads: their values count
    as zero, and so does what they read. It saves nothing: the scores of those heads are computed,
    for the softmax is not renormalized. Tokens that see nothing (padding) give zero, or their own
    value where visual tokens do, and send no gradient to other tokens.

    Raises ValueError for shapes that do not fit together or to the plan, and for a gate that the
    merge does not have, or the lack of one.
    """
    first_scored, _ = plan.scored_tokens
    scored = attend_scored_tokens(
        query[first_scored:],
        key,
        value,
        plan,
        rotary,
        score_function=score_function,
        backend=backend,
        gate=gate,
        head_mask=head_mask,
    )
    if first_scored == 0:
        return scored
    if plan.num_diagonal_tokens == 0:
        return torch.cat((scored.new_zeros(first_scored, *scored.shape[1:]), scored))
    own_values = value[: plan.num_diagonal_tokens]
    if head_mask is not None:
        own_values = own_values * head_mask.to(value.dtype).unsqueeze(-1)
    return torch.cat((diagonal_attention(own_values, query.shape[1]), scored))


def attend_scored_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    rotary: Rotary,
    *,
    score_function: ScoreFunction,
    backend: Backend,
    gate: Tensor | None = None,
    head_mask: Tensor | None = None,
) -> Tensor:
    """Attention output of the tokens that have scores, [plan.num_scored_tokens, Hq, D], of the
    dtype of `query`.

    For models that project no query of other tokens: `query` holds the scored tokens alone, `key`,
    `value` and `rotary` all S tokens. Under merge "cascade" T2V is not part of it, see
    `attend_images`.
    """
    _check_shapes(query, key, value, plan)
    if head_mask is not None:
        value = _silence(value, head_mask, plan.num_visual_tokens)

    def attend(parts: tuple[Part, ...]) -> Tensor:
        return _attend(parts, query, key, value, plan, rotary, score_function, backend)

    if plan.merge in ("alpha", "cascade"):
        if gate is not None:
            raise ValueError(f"merge '{plan.merge}' takes no gate")
        out = attend(plan.parts)
    else:
        out = weighted_merge(
            attend(plan.visual_parts), attend(plan.parts), plan.merge, gate, plan.sees_images
        )
    if head_mask is not None and plan.scored_tokens[0] == 0:
        heads = head_mask.repeat_interleave(query.shape[1] // key.shape[1])
        out = _silence(out, heads, plan.num_visual_tokens)
    return out


def attend_images(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    rotary: Rotary,
    *,
    score_function: ScoreFunction,
    backend: Backend,
) -> Tensor:
    """T2V alone, [plan.num_scored_tokens, Hq, D], of a plan whose merge leaves it a softmax of its
    own; arguments and dtype as of `attend_scored_tokens`. Tokens that see no image give zero.

    For merge "cascade", where query, key and value have projections of their own. Of `key` and
    `value` only visual tokens are read: they may hold those alone.
    """
    return _attend(plan.visual_parts, query, key, value, plan, rotary, score_function, backend)


def diagonal_attention(value: Tensor, num_query_heads: int) -> Tensor:
    """Equation 2: softmax over oneself is 1, so each head outputs its value. [tokens, Hq, D], same
    dtype."""
    group = num_query_heads // value.shape[1]
    return value if group == 1 else value.repeat_interleave(group, dim=1)


def _silence(states: Tensor, heads: Tensor, num_tokens: int) -> Tensor:
    """Set chosen heads of the leading tokens to zero, [S, heads, D]; `heads` holds ones and
    zeros."""
    leading = states[:num_tokens] * heads.to(states.dtype).unsqueeze(-1)
    return torch.cat((leading, states[num_tokens:]))


def _attend(
    parts: tuple[Part, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    rotary: Rotary,
    score_function: ScoreFunction,
    backend: Backend,
) -> Tensor:
    shared = plan.parts_share_keys if parts is plan.parts else plan.visual_parts_share_keys
    joint = _JointSoftmax.apply(
        query, key, value, *rotary, parts, shared, plan.scored_tokens[0], score_function, backend
    )
    assert isinstance(joint, Tensor)
    return joint


class _JointSoftmax(torch.autograd.Function):
    """Parts as one softmax; its backward passes the merged (out, lse) to every part."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        parts: tuple[Part, ...],
        shared_keys: bool,
        first_scored: int,
        score_function: ScoreFunction,
        backend: Backend,
    ) -> Tensor:
        tables = _tables(cos, sin, first_scored)
        results = [
            backend.forward(*_read(part, query, key, value, tables), part, score_function)
            for part in parts
        ]
        if parts:
            places = [part.query_tokens.places for part in parts]
            outs, lses = zip(*results, strict=True)
            out, lse = join_parts(outs, lses, places, query.dtype)
        else:
            out = lse = torch.zeros_like(query)
        ctx.save_for_backward(query, key, value, cos, sin, out, lse)
        ctx.parts, ctx.shared_keys, ctx.first_scored = parts, shared_keys, first_scored
        ctx.score_function, ctx.backend = score_function, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, cos, sin, out, lse = ctx.saved_tensors
        parts: tuple[Part, ...] = ctx.parts
        if not parts:  # no images; whoever projected the query still waits for its gradient
            return *map(torch.zeros_like, (query, key, value)), *[None] * 7
        tables = _tables(cos, sin, ctx.first_scored)
        of_queries, of_keys = [], []
        for part in parts:
            q, k, v = _read(part, query, key, value, tables)
            do, o, s = (part.query_tokens.take(tensor) for tensor in (grad_out, out, lse))
            dq, dk, dv = ctx.backend.backward(do, q, k, v, o, s, part, ctx.score_function)
            of_queries.append(dq)
            of_keys.append((dk, dv))
        query_rotaries, key_rotaries = (
            [table if part.rotary else None for part in parts] for table in tables
        )
        places = [part.query_tokens.places for part in parts]
        grad_query = add_query_gradients(of_queries, places, query_rotaries, query.dtype)
        if ctx.shared_keys:
            return grad_query, *_add_shared(of_keys, parts, key_rotaries, key), *[None] * 7
        places = [part.key_tokens.places for part in parts]
        # A cross-attention's keys are those of visual tokens alone, which come first.
        places = [where if where is None else where[: len(key)] for where in places]
        return grad_query, *add_key_gradients(of_keys, places, key_rotaries, key.dtype), *[None] * 7


def _add_shared(
    grads: Sequence[tuple[Tensor, Tensor]],
    parts: Sequence[Part],
    rotaries: Sequence[Rotary | None],
    key: Tensor,
) -> tuple[Tensor, Tensor]:
    """`add_key_gradients` where several segments read a key."""
    # A patch in YOPO's windows is a key of 25 segments: BF16 would lose what the last ones add.
    dtype = merge_dtype(key.dtype)
    grad_key, grad_value = (torch.zeros_like(key, dtype=dtype) for _ in range(2))
    for part, (dk, dv), rotary in zip(parts, grads, rotaries, strict=True):
        if rotary is not None:
            cos, sin = (part.key_tokens.take(table) for table in rotary)
            dk = apply_rotary(dk, (cos, -sin))
        part.key_tokens.add(grad_key, dk)
        part.key_tokens.add(grad_value, dv)
    return grad_key.to(key.dtype), grad_value.to(key.dtype)


def _tables(cos: Tensor, sin: Tensor, first_scored: int) -> tuple[Rotary, Rotary]:
    """Tables of all queries and of all keys."""
    return (cos[first_scored:], sin[first_scored:]), (cos, sin)


def _read(
    part: Part, query: Tensor, key: Tensor, value: Tensor, tables: tuple[Rotary, Rotary]
) -> tuple[Tensor, Tensor, Tensor]:
    """The part's own tokens, rotated if its scores are; backward repeats this to save memory."""
    queries, keys = part.query_tokens, part.key_tokens
    v = keys.take(value)
    if not part.rotary:
        return queries.take(query), keys.take(key), v
    of_queries, of_keys = tables
    return take_rotated(queries, query, of_queries), take_rotated(keys, key, of_keys), v


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> None:
    expected = (plan.num_scored_tokens, plan.num_tokens, plan.num_tokens)
    actual = (query.shape[0], key.shape[0], value.shape[0])
    if actual != expected:
        raise ValueError(f"query, key and value have {actual} tokens; the plan is for {expected}")
    if query.shape[1] % key.shape[1] or key.shape != value.shape:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} "
            "do not form groups of query heads over equal key and value heads"
        )
