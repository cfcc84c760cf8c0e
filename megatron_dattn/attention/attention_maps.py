"""What a layer attends to, for reports: how much of it goes to images, and to which patches.

The attention itself computes none of this, and training does not pay for it: these functions are a
forward pass of their own over the same queries and keys, without gradient. They take text rows
apart into T2V and T2T whatever the preset computes: plain self-attention as well, whose plan has
one part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_dattn.attention.backends.base import Backend
from megatron_dattn.attention.config import AttentionConfig, Merge, Positions
from megatron_dattn.attention.layout import RowRange, TokenLayout
from megatron_dattn.attention.merge import merge_dtype
from megatron_dattn.attention.plan.index import Rows
from megatron_dattn.attention.plan.parts import Part, plan_attention
from megatron_dattn.attention.positions import Rotary, apply_rotary


@dataclass(frozen=True)
class ReportPlan:
    """The text rows' attention of one pack, taken apart; none of the parts is empty."""

    layout: TokenLayout
    merge: Merge
    t2v: tuple[Part, ...]
    t2t: tuple[Part, ...]
    device: torch.device

    @cached_property
    def num_seeing(self) -> Tensor:
        """Text rows that see an image, a number on the device: reading it would wait for it."""
        return self.sees_images.sum()

    @cached_property
    def sees_images(self) -> Tensor:
        """Whether a text row sees an image, bool [text_budget]."""
        sees = torch.zeros(self.layout.text_budget, dtype=torch.bool, device=self.device)
        for part in self.t2v:
            part.query_rows.put(sees, torch.ones_like(part.query_rows.take(sees)))
        return sees


@dataclass(frozen=True)
class Scoring:
    """How a layer's scores come from its queries and keys."""

    plan: ReportPlan
    rotary: Rotary  # tables of all S rows
    scale: float
    backend: Backend
    softcap: float | None = None


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
def visual_weight(query: Tensor, key: Tensor, scoring: Scoring) -> Tensor:
    """Equation 9, alpha_V = sigmoid(S_V - S_T), of every text row and head, [text_budget, Hq].

    It is the share of the attention that a text row gives to images, where the merge is "alpha".
    Under the other merges it is what alpha-weighting would give them for the same scores. Heads
    that a preset makes deaf to images count like the others: their scores are those of the softmax.

    Args:
        query: as projected, without rotation, of all rows or of the text rows alone, [.., Hq, D].
        key: of all rows, [S, Hk, D].

    Returns:
        Float32 (float64 for float64). Rows that see no image, padding among them, give 0: leave
        them out of means by `scoring.plan.sees_images`.
    """
    plan = scoring.plan
    visual, text = (_log_sum_exps(p, query, key, scoring) for p in (plan.t2v, plan.t2t))
    # In padding both are -inf, and their difference is NaN.
    return torch.where(plan.sees_images.unsqueeze(-1), torch.sigmoid(visual - text), 0.0)


@torch.no_grad()
def image_attention(query: Tensor, key: Tensor, scoring: Scoring, rows: Sequence[int]) -> Tensor:
    """The probabilities with which chosen text rows attend to their images, [rows, Hq, n].

    They are those of the layer's own softmax: under merge "alpha" a row's sum over the n visual
    rows of its sample is its alpha_V, under the others, which give images a softmax of their own,
    it is 1. Visual rows that the text row does not see have 0.

    Args:
        query, key: as for `visual_weight`.
        rows: places among the text rows, 0 .. text_budget - 1, all of one sample.

    Returns:
        In the precision of `visual_weight`. Raises ValueError for rows of several samples, and for
        padding.
    """
    plan = scoring.plan
    first, end = plan.layout.visual_rows(_sample_of(plan.layout, rows))
    if not plan.t2v:
        shape = (len(rows), query.shape[1], end - first)
        return query.new_zeros(shape, dtype=merge_dtype(query.dtype))
    chosen = torch.tensor(rows, dtype=torch.int64, device=plan.device)
    scores = _visual_scores(query, key, scoring, chosen, Rows(end - first, start=first))
    seen = _seen_rows(plan.t2v, chosen, (first, end))
    total = _log_sum_exps(plan.t2v, query, key, scoring)
    if plan.merge == "alpha":
        total = torch.logaddexp(total, _log_sum_exps(plan.t2t, query, key, scoring))
    probabilities = torch.exp(scores - total[chosen].unsqueeze(-1))
    return torch.where(seen.unsqueeze(1), probabilities, 0.0)


def _log_sum_exps(parts: tuple[Part, ...], query: Tensor, key: Tensor, scoring: Scoring) -> Tensor:
    """S of every text row over the keys of all parts, [text_budget, Hq]; -inf without keys."""
    text = _text_rows(query, scoring)
    lse = text.new_full(text.shape[:2], -torch.inf, dtype=merge_dtype(query.dtype))
    for part in parts:
        q, k = part.query_rows.take(text), part.key_rows.take(key)
        if part.rotary:
            q, k = _rotate(q, k, part.query_rows, part.key_rows, scoring)
        # Backends give an output too: keys stand in for the values, which it would need.
        _, part_lse = scoring.backend.forward(q, k, k, part, scoring.scale, scoring.softcap)
        part.query_rows.put(lse, torch.logaddexp(part.query_rows.take(lse), part_lse))
    return lse


def _visual_scores(
    query: Tensor, key: Tensor, scoring: Scoring, chosen: Tensor, visual: Rows
) -> Tensor:
    """Scores of chosen text rows with visual rows, seen or not, [rows, Hq, n]."""
    q, k = _text_rows(query, scoring)[chosen], visual.take(key)
    if scoring.plan.t2v[0].rotary:
        q, k = _rotate(q, k, Rows(len(chosen), index=chosen), visual, scoring)
    dtype = merge_dtype(query.dtype)
    k = k.repeat_interleave(query.shape[1] // key.shape[1], dim=1).to(dtype)
    scores = torch.einsum("qhd,khd->qhk", q.to(dtype), k) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    return scores


def _seen_rows(parts: tuple[Part, ...], chosen: Tensor, visual: RowRange) -> Tensor:
    """Which of a range of visual rows each chosen text row sees, bool [rows, n]."""
    first, end = visual
    seen = torch.zeros(len(chosen), end - first, dtype=torch.bool, device=chosen.device)
    for part in parts:
        queries = _numbers(part.query_rows, chosen.device).split(part.query_lengths)
        keys = _numbers(part.key_rows, chosen.device).split(part.key_lengths)
        for of_segment, segment_keys in zip(queries, keys, strict=True):
            members, places = (chosen.unsqueeze(1) == of_segment).nonzero().unbind(1)
            for member, place in zip(members.tolist(), places.tolist(), strict=True):
                visible = segment_keys[: place + 1] if part.causal else segment_keys
                seen[member, visible - first] = True
    return seen


def _text_rows(query: Tensor, scoring: Scoring) -> Tensor:
    """The queries of text rows: the last ones."""
    return query[query.shape[0] - scoring.plan.layout.text_budget :]


def _rotate(
    query: Tensor, key: Tensor, query_rows: Rows, key_rows: Rows, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    cos, sin = scoring.rotary
    first_text = scoring.plan.layout.visual_budget
    of_queries = query_rows.take(cos[first_text:]), query_rows.take(sin[first_text:])
    of_keys = key_rows.take(cos), key_rows.take(sin)
    return apply_rotary(query, of_queries), apply_rotary(key, of_keys)


def _numbers(rows: Rows, device: torch.device) -> Tensor:
    """The rows' own numbers, int64 [length]."""
    if rows.index is not None:
        return rows.index
    return torch.arange(rows.start, rows.start + rows.length, device=device)


def _sample_of(layout: TokenLayout, rows: Sequence[int]) -> int:
    for sample in range(layout.num_samples):
        start, end = layout.text_cu_seqlens[sample], layout.text_cu_seqlens[sample + 1]
        if rows and start <= min(rows) and max(rows) < end:
            return sample
    raise ValueError(
        f"text rows {list(rows)} are not of one sample; the samples' text rows begin at "
        f"{list(layout.text_cu_seqlens)}"
    )
