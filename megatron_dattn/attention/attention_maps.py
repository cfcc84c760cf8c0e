"""What a layer attends to, for reports: how much of it goes to images, and to which patches.

The attention itself computes none of this, and training does not pay for it: these functions are a
forward pass of their own over the same queries and keys, without gradient. They take text tokens
apart into T2V and T2T whatever the preset computes: plain self-attention as well, whose plan has
one part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_dattn.attention.backends.base import Backend, ScoreFunction
from megatron_dattn.attention.config import AttentionConfig, Merge, Positions
from megatron_dattn.attention.layout import TokenLayout, TokenRange
from megatron_dattn.attention.merge import merge_dtype
from megatron_dattn.attention.plan.index import TokenIndex
from megatron_dattn.attention.plan.parts import Part, plan_attention
from megatron_dattn.attention.positions import Rotary, apply_rotary


@dataclass(frozen=True)
class ReportPlan:
    """The text tokens' attention of one pack, taken apart; none of the parts is empty."""

    layout: TokenLayout
    merge: Merge
    t2v: tuple[Part, ...]
    t2t: tuple[Part, ...]
    device: torch.device

    @cached_property
    def num_seeing(self) -> Tensor:
        """Text tokens that see an image, int64 [] on the device: reading it would wait for it."""
        return self.sees_images.sum()

    @cached_property
    def sees_images(self) -> Tensor:
        """True for text tokens that see an image, bool [text_budget]."""
        sees = torch.zeros(self.layout.text_budget, dtype=torch.bool, device=self.device)
        for part in self.t2v:
            part.query_tokens.put(sees, torch.ones_like(part.query_tokens.take(sees)))
        return sees


@dataclass(frozen=True)
class ReportInputs:
    """What a report needs to know of a layer besides its queries and keys."""

    plan: ReportPlan
    rotary: Rotary  # tables of all S tokens
    score_function: ScoreFunction
    backend: Backend


def plan_report(
    layout: TokenLayout,
    config: AttentionConfig,
    device: torch.device | str = "cpu",
    *,
    window: int | None = None,
) -> ReportPlan:
    """Take the attention of `plan_attention`, with the same arguments, apart for a report."""
    device = torch.device(device)
    # A configuration with the same T2V and T2T and nothing else, kept apart as by any merge but
    # "alpha". A plan needs no positions.
    rotary = config.t2v.rotary
    text_alone = AttentionConfig(
        v2v="none",
        t2v=config.t2v,
        positions=Positions(text="gap", visual="sequence") if rotary else Positions(),
        merge="sum",
        window="reading_order" if config.window_in_reading_order else "part",
    )
    plan = plan_attention(layout, text_alone, device, window=window)
    return ReportPlan(layout, config.merge, plan.visual_parts, plan.parts, device)


@torch.no_grad()
def alpha_v(query: Tensor, key: Tensor, inputs: ReportInputs) -> Tensor:
    """Equation 9, alpha_V = sigmoid(S_V - S_T), of text tokens and heads, fp32 [text_budget, Hq].

    It is the share of the attention that a text token gives to images, where the merge is "alpha".
    Under the other merges it is what alpha-weighting would give them for the same scores. Heads
    whose images a preset masks count like the others: their scores are those of the softmax.

    Args:
        query: as projected, without rotation, of all tokens or of the text tokens alone, [.., Hq,
            D], any floating dtype.
        key: of all tokens, [S, Hk, D], same dtype.

    Returns:
        Float32 (float64 for float64). Tokens that see no image, padding among them, give 0: leave
        them out of means by `inputs.plan.sees_images`.
    """
    plan = inputs.plan
    visual, text = (_log_sum_exps(p, query, key, inputs) for p in (plan.t2v, plan.t2t))
    # In padding both are -inf, and their difference is NaN.
    return torch.where(plan.sees_images.unsqueeze(-1), torch.sigmoid(visual - text), 0.0)


@torch.no_grad()
def image_attention(
    query: Tensor, key: Tensor, inputs: ReportInputs, tokens: Sequence[int]
) -> Tensor:
    """The probabilities with which chosen text tokens attend to their images, of `alpha_v`'s dtype,
    [tokens, Hq, n].

    They are those of the layer's own softmax: under merge "alpha" a token's sum over the n visual
    tokens of its sample is its alpha_V, under the others, which give images a softmax of their own,
    it is 1. Visual tokens that the text token does not see have 0.

    Args:
        query, key: as for `alpha_v`.
        tokens: places among the text tokens, 0 .. text_budget - 1, all of one sample.

    Returns:
        The n visual tokens are those of the sample. Raises ValueError for tokens of several
        samples, and for padding.
    """
    plan = inputs.plan
    first, end = plan.layout.visual_tokens(_sample_of(plan.layout, tokens))
    if not plan.t2v:
        shape = (len(tokens), query.shape[1], end - first)
        return query.new_zeros(shape, dtype=merge_dtype(query.dtype))
    chosen = torch.tensor(tokens, dtype=torch.int64, device=plan.device)
    scores = _visual_scores(query, key, inputs, chosen, TokenIndex(end - first, start=first))
    seen = _seen_tokens(plan.t2v, chosen, (first, end))
    total = _log_sum_exps(plan.t2v, query, key, inputs)
    if plan.merge == "alpha":
        total = torch.logaddexp(total, _log_sum_exps(plan.t2t, query, key, inputs))
    probabilities = torch.exp(scores - total[chosen].unsqueeze(-1))
    return torch.where(seen.unsqueeze(1), probabilities, 0.0)


def _log_sum_exps(
    parts: tuple[Part, ...], query: Tensor, key: Tensor, inputs: ReportInputs
) -> Tensor:
    """S of every text token over the keys of all parts, [text_budget, Hq]; -inf without keys."""
    text = _text_tokens(query, inputs)
    lse = text.new_full(text.shape[:2], -torch.inf, dtype=merge_dtype(query.dtype))
    for part in parts:
        q, k = part.query_tokens.take(text), part.key_tokens.take(key)
        if part.rotary:
            q, k = _rotate(q, k, part.query_tokens, part.key_tokens, inputs)
        # Backends give an output too: keys stand in for the values, which it would need.
        _, part_lse = inputs.backend.forward(q, k, k, part, inputs.score_function)
        part.query_tokens.put(lse, torch.logaddexp(part.query_tokens.take(lse), part_lse))
    return lse


def _visual_scores(
    query: Tensor, key: Tensor, inputs: ReportInputs, chosen: Tensor, visual: TokenIndex
) -> Tensor:
    """Scores of chosen text tokens with visual tokens, seen or not, [tokens, Hq, n]."""
    q, k = _text_tokens(query, inputs)[chosen], visual.take(key)
    if inputs.plan.t2v[0].rotary:
        q, k = _rotate(q, k, TokenIndex(len(chosen), index=chosen), visual, inputs)
    dtype = merge_dtype(query.dtype)
    k = k.repeat_interleave(query.shape[1] // key.shape[1], dim=1).to(dtype)
    scores = torch.einsum("qhd,khd->qhk", q.to(dtype), k) * inputs.score_function.scale
    if (softcap := inputs.score_function.softcap) is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores


def _seen_tokens(parts: tuple[Part, ...], chosen: Tensor, visual: TokenRange) -> Tensor:
    """Which of a range of visual tokens each chosen text token sees, bool [tokens, n]."""
    first, end = visual
    seen = torch.zeros(len(chosen), end - first, dtype=torch.bool, device=chosen.device)
    for part in parts:
        queries = _numbers(part.query_tokens, chosen.device).split(part.query_lengths)
        keys = _numbers(part.key_tokens, chosen.device).split(part.key_lengths)
        for of_segment, segment_keys in zip(queries, keys, strict=True):
            members, places = (chosen.unsqueeze(1) == of_segment).nonzero().unbind(1)
            for member, place in zip(members.tolist(), places.tolist(), strict=True):
                visible = segment_keys[: place + 1] if part.causal else segment_keys
                seen[member, visible - first] = True
    return seen


def _text_tokens(query: Tensor, inputs: ReportInputs) -> Tensor:
    """The queries of text tokens: the last ones."""
    return query[query.shape[0] - inputs.plan.layout.text_budget :]


def _rotate(
    query: Tensor,
    key: Tensor,
    query_tokens: TokenIndex,
    key_tokens: TokenIndex,
    inputs: ReportInputs,
) -> tuple[Tensor, Tensor]:
    cos, sin = inputs.rotary
    first_text = inputs.plan.layout.visual_budget
    of_queries = query_tokens.take(cos[first_text:]), query_tokens.take(sin[first_text:])
    of_keys = key_tokens.take(cos), key_tokens.take(sin)
    return apply_rotary(query, of_queries), apply_rotary(key, of_keys)


def _numbers(tokens: TokenIndex, device: torch.device) -> Tensor:
    """The tokens' own numbers, int64 [length]."""
    if tokens.index is not None:
        return tokens.index
    return torch.arange(tokens.start, tokens.start + tokens.length, device=device)


def _sample_of(layout: TokenLayout, tokens: Sequence[int]) -> int:
    for sample in range(layout.num_samples):
        start, end = layout.text_cu_seqlens[sample], layout.text_cu_seqlens[sample + 1]
        if tokens and start <= min(tokens) and max(tokens) < end:
            return sample
    raise ValueError(
        f"text tokens {list(tokens)} are not of one sample; the samples' text tokens begin at "
        f"{list(layout.text_cu_seqlens)}"
    )
