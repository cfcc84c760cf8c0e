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

The same holds where the keys of T2V are spread over processes: each computes the part of its own
images, and gives it the pair that they have together (`ImagesElsewhere`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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

KeyGradients = tuple[Tensor, Tensor]  # of keys and of values


class ImagesElsewhere(Protocol):
    """What other processes that hold images of the pack add to a softmax of its text tokens, which
    every one of them holds."""

    def attend(
        self, softmax: "JointSoftmax", query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Output [N, Hq, D] and log-sum-exp [N, Hq] of all parts and over all images, of any
        floating dtype; arguments as of `JointSoftmax.attend`."""

    def backward(
        self, softmax: "JointSoftmax", grad_out: Tensor, saved: Sequence[Tensor]
    ) -> tuple[Tensor, list[KeyGradients]]:
        """The gradients of the queries, [N, Hq, D] of any floating dtype, and of keys and values;
        arguments and what is returned as of `JointSoftmax.backward`, of all parts."""


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
    elsewhere: ImagesElsewhere | None = None,
) -> Tensor:
    """Attention output of the tokens that have scores, [plan.num_scored_tokens, Hq, D], of the
    dtype of `query`.

    For models that project no query of other tokens: `query` holds the scored tokens alone, `key`,
    `value` and `rotary` all S tokens. Under merge "cascade" T2V is not part of it, see
    `attend_images`. With images `elsewhere` only text tokens may have scores.
    """
    _check_shapes(query, key, value, plan)
    if head_mask is not None:
        value = _silence(value, head_mask, plan.num_visual_tokens)

    def attend(parts: tuple[Part, ...], elsewhere: ImagesElsewhere | None) -> tuple[Tensor, Tensor]:
        return _attend(parts, query, key, value, plan, rotary, score_function, backend, elsewhere)

    if plan.merge in ("alpha", "cascade"):
        if gate is not None:
            raise ValueError(f"merge '{plan.merge}' takes no gate")
        out, _ = attend(plan.parts, elsewhere if plan.merge == "alpha" else None)
    else:
        images, lse = attend(plan.visual_parts, elsewhere)
        text, _ = attend(plan.parts, None)
        out = weighted_merge(images, text, plan.merge, gate, lse[:, 0] > -torch.inf)
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
    elsewhere: ImagesElsewhere | None = None,
) -> Tensor:
    """T2V alone, [plan.num_scored_tokens, Hq, D], of a plan whose merge leaves it a softmax of its
    own; arguments and dtype as of `attend_scored_tokens`. Tokens that see no image give zero.

    For merge "cascade", where query, key and value have projections of their own. Of `key` and
    `value` only visual tokens are read: they may hold those alone.
    """
    out, _ = _attend(
        plan.visual_parts, query, key, value, plan, rotary, score_function, backend, elsewhere
    )
    return out


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
    elsewhere: ImagesElsewhere | None,
) -> tuple[Tensor, Tensor]:
    """One softmax's output and its log-sum-exp, which has no gradient."""
    shared = plan.parts_share_keys if parts is plan.parts else plan.visual_parts_share_keys
    first = plan.scored_tokens[0]
    softmax = JointSoftmax(parts, shared, rotary, first, score_function, backend)
    joint = _Attend.apply(query, key, value, softmax, elsewhere)
    assert isinstance(joint, tuple)
    return joint


@dataclass(frozen=True)
class JointSoftmax:
    """The parts of one softmax, T2V first, and what computes them."""

    parts: tuple[Part, ...]
    share_keys: bool
    """Whether several segments read a key."""
    rotary: Rotary
    first_scored: int
    """The first token that has a query."""
    score_function: ScoreFunction
    backend: Backend

    def attend(
        self, parts: Sequence[Part], query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Some of the parts as one softmax.

        Args:
            query: of the scored tokens, [N, Hq, D], any floating dtype.
            key, value: of all tokens, [S, Hk, D], same dtype.
            dtype: of the output.

        Returns:
            Output [N, Hq, D] and log-sum-exp [N, Hq], float32 (float64 for float64): 0 and -inf of
            tokens that see nothing.
        """
        if not parts:
            lse = query.new_full(query.shape[:2], -torch.inf, dtype=merge_dtype(query.dtype))
            return torch.zeros_like(query, dtype=dtype), lse
        function, places = self.score_function, [part.query_tokens.places for part in parts]
        results = [
            self.backend.forward(*self._read(part, query, key, value), part, function)
            for part in parts
        ]
        outs, lses = zip(*results, strict=True)
        return join_parts(outs, lses, places, dtype)

    def backward(
        self,
        parts: Sequence[Part],
        grad_out: Tensor,
        saved: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> tuple[Tensor, list[KeyGradients]]:
        """The gradients of some parts, from that of the whole softmax's output.

        Args:
            grad_out: [N, Hq, D], any floating dtype.
            saved: query, key and value, and the output and log-sum-exp of all parts.
            dtype: of the queries' gradient.

        Returns:
            The queries' gradient, [N, Hq, D]; and each part's of its own keys and values, [n, Hk,
            D] each, of any floating dtype, rotated as those are.
        """
        query, key, value, out, lse = saved
        if not parts:
            return torch.zeros_like(query, dtype=dtype), []
        of_queries, of_keys = [], []
        for part in parts:
            q, k, v = self._read(part, query, key, value)
            do, o, s = (part.query_tokens.take(tensor) for tensor in (grad_out, out, lse))
            dq, dk, dv = self.backend.backward(do, q, k, v, o, s, part, self.score_function)
            of_queries.append(dq)
            of_keys.append((dk, dv))
        places = [part.query_tokens.places for part in parts]
        rotaries = [self._of_queries if part.rotary else None for part in parts]
        return add_query_gradients(of_queries, places, rotaries, dtype), of_keys

    def add_keys(self, of_keys: Sequence[KeyGradients], key: Tensor) -> KeyGradients:
        """Gradients of keys and values, [S, Hk, D] of the dtype of `key`, from those of all
        parts."""
        if not self.parts:
            return torch.zeros_like(key), torch.zeros_like(key)
        rotaries = [self.rotary if part.rotary else None for part in self.parts]
        if self.share_keys:
            return _add_shared(of_keys, self.parts, rotaries, key)
        places = [part.key_tokens.places for part in self.parts]
        # A cross-attention's keys are those of visual tokens alone, which come first.
        places = [where if where is None else where[: len(key)] for where in places]
        return add_key_gradients(of_keys, places, rotaries, key.dtype)

    @property
    def _of_queries(self) -> Rotary:
        cos, sin = self.rotary
        return cos[self.first_scored :], sin[self.first_scored :]

    def _read(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The part's own tokens, rotated if its scores are; backward repeats this to save
        memory."""
        queries, keys = part.query_tokens, part.key_tokens
        v = keys.take(value)
        if not part.rotary:
            return queries.take(query), keys.take(key), v
        q = take_rotated(queries, query, self._of_queries)
        return q, take_rotated(keys, key, self.rotary), v


class _Attend(torch.autograd.Function):
    """Parts as one softmax; its backward passes the merged (out, lse) to every part."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        softmax: JointSoftmax,
        elsewhere: ImagesElsewhere | None,
    ) -> tuple[Tensor, Tensor]:
        if elsewhere is None:
            out, lse = softmax.attend(softmax.parts, query, key, value, query.dtype)
        else:
            out, lse = elsewhere.attend(softmax, query, key, value)
            out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # else a kernel writes zeros for the log-sum-exp
        ctx.softmax, ctx.elsewhere = softmax, elsewhere
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 5
        softmax: JointSoftmax = ctx.softmax
        saved = ctx.saved_tensors
        query, key = saved[:2]
        if ctx.elsewhere is None:
            grad_query, of_keys = softmax.backward(softmax.parts, grad_out, saved, query.dtype)
        else:
            grad_query, of_keys = ctx.elsewhere.backward(softmax, grad_out, saved)
        # Also without a part, as in a pack without images: what projected the query waits for it.
        return grad_query.to(query.dtype), *softmax.add_keys(of_keys, key), None, None


def _add_shared(
    grads: Sequence[KeyGradients],
    parts: Sequence[Part],
    rotaries: Sequence[Rotary | None],
    key: Tensor,
) -> KeyGradients:
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
