"""The attention of one micro-batch as a list of parts, planned once and shared by all layers.

A part is a set of (query tokens, key tokens) segments under one rule: causal or not, rotary or not.
The paper's T2V and T2T are two parts; their partial softmaxes are merged afterwards (equation 7).
Conventional self-attention is a single causal part over the tokens in reading order, which is what
a flash kernel does best and so a fair baseline.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from megatron_dattn.attention.config import AttentionConfig, Merge
from megatron_dattn.attention.layout import TokenLayout, TokenRange
from megatron_dattn.attention.plan.index import TokenIndex, range_table
from megatron_dattn.attention.plan.padding import PaddedBatch, padded_batches
from megatron_dattn.attention.plan.patches import SegmentTable
from megatron_dattn.attention.plan.segments import PartRule, Segment, attention_rules
from megatron_dattn.attention.transfer import all_to_device

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Part:
    """Segments under one rule. No segment is empty; a query token stands in at most one of them."""

    name: str
    query_tokens: TokenIndex  # tokens of the query tensor, segment after segment
    key_tokens: TokenIndex  # tokens of the key and value tensors, segment after segment
    query_lengths: tuple[int, ...]  # per segment
    key_lengths: tuple[int, ...]
    causal: bool  # the i-th query of a segment sees its first i + 1 keys; lengths are equal
    rotary: bool
    query_cu_seqlens: Tensor  # segment boundaries for variable-length kernels, int32 [segments + 1]
    key_cu_seqlens: Tensor  # the same of the keys
    window: int | None = None  # in a causal part: a query sees this many keys at most, the last
    is_t2v: bool = False

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return self.query_cu_seqlens.device

    def with_tensors(self, function: Callable[[Tensor], Tensor]) -> "Part":
        """The same part with what the function makes of each tensor, [n] of its dtype."""
        return replace(
            self,
            query_tokens=self.query_tokens.with_tensors(function),
            key_tokens=self.key_tokens.with_tensors(function),
            query_cu_seqlens=function(self.query_cu_seqlens),
            key_cu_seqlens=function(self.key_cu_seqlens),
        )

    @cached_property
    def batches(self) -> tuple[PaddedBatch, ...]:
        """The segments as dense batches, for kernels without variable lengths."""
        return padded_batches(self.query_lengths, self.key_lengths, self.causal, self.device)


@dataclass(frozen=True)
class AttentionPlan:
    """Who attends to whom in one micro-batch, ready for every layer.

    `scored_tokens` are the tokens that have queries: all of them, or the text tokens where visual
    tokens do not attend. Query tensors hold those tokens alone; key and value tensors hold all.
    """

    num_tokens: int
    num_visual_tokens: int  # leading tokens, padding included
    scored_tokens: TokenRange
    num_diagonal_tokens: int  # leading (visual) tokens whose output is their own value, equation 2
    parts: tuple[Part, ...]  # of one joint softmax; T2V too where the merge is "alpha"
    visual_parts: tuple[Part, ...]  # T2V, where the merge leaves it a softmax of its own
    merge: Merge
    device: torch.device

    def with_tensors(
        self, function: Callable[[Tensor], Tensor], device: torch.device
    ) -> "AttentionPlan":
        """The same plan with what the function makes of each tensor, [n], any dtype, on that
        device."""
        parts, visual_parts = (
            tuple(part.with_tensors(function) for part in parts)
            for parts in (self.parts, self.visual_parts)
        )
        return replace(self, parts=parts, visual_parts=visual_parts, device=device)

    @property
    def num_scored_tokens(self) -> int:
        return self.scored_tokens[1] - self.scored_tokens[0]

    @cached_property
    def parts_share_keys(self) -> bool:
        """True if a key of the joint softmax belongs to several segments of its parts."""
        return _share_keys(self.parts)

    @cached_property
    def visual_parts_share_keys(self) -> bool:
        """The same of `visual_parts`."""
        return _share_keys(self.visual_parts)


def plan_attention(
    layout: TokenLayout,
    config: AttentionConfig,
    device: torch.device | str = "cpu",
    *,
    window: int | None = None,
) -> AttentionPlan:
    """Turn a layout and a configuration into parts whose index tensors live on `device`.

    `window` is the sliding window of a layer that has one: a token sees so many of the tokens that
    a causal part shows it, itself included. It counts tokens of that part: text or visual tokens
    alone, or, in plain self-attention and where `config.window` says so, all tokens in reading
    order. T2V has the window under t2v.window="inherit" and in reading order, V2T in reading order
    alone.
    """
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} tokens hides a token from itself")
    first_scored = 0 if config.scores_visual_tokens else layout.visual_budget
    scored = first_scored, layout.num_tokens
    joint, apart = split_parts(attention_rules(layout, config, window), config.merge, scored)
    plan = AttentionPlan(
        num_tokens=layout.num_tokens,
        num_visual_tokens=layout.visual_budget,
        scored_tokens=scored,
        num_diagonal_tokens=layout.visual_budget if config.v2v == "diagonal" else 0,
        parts=joint,
        visual_parts=apart,
        merge=config.merge,
        device=HOST,
    )
    return plan_to_device(plan, device)


def plan_to_device(plan: AttentionPlan, device: torch.device | str) -> AttentionPlan:
    """A plan of the host on the device, in one copy."""
    ((moved,), _) = plans_to_device([plan], (), device)
    return moved


def plans_to_device(
    plans: Sequence[AttentionPlan], others: Sequence[Tensor], device: torch.device | str
) -> tuple[list[AttentionPlan], list[Tensor]]:
    """Plans and other tensors of the host, of any shape and dtype, on the device in one copy."""
    host = list(others)

    def collect(tensor: Tensor) -> Tensor:
        host.append(tensor)
        return tensor

    for plan in plans:
        plan.with_tensors(collect, plan.device)
    moved = iter(all_to_device(host, device))
    there = [next(moved) for _ in others]
    device = torch.device(device)
    return [plan.with_tensors(lambda _: next(moved), device) for plan in plans], there


def split_parts(
    rules: Iterable[PartRule], merge: Merge, scored: TokenRange
) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The parts of one joint softmax, and T2V where the merge keeps it apart; none is empty."""
    joint: list[Part] = []
    apart: list[Part] = []
    for rule in rules:
        part = build_part(rule, scored)
        if part.query_lengths:
            (apart if rule.is_t2v and merge != "alpha" else joint).append(part)
    return tuple(joint), tuple(apart)


def build_part(rule: PartRule, scored: TokenRange) -> Part:
    """A part, on the host, of those segments that are not empty; `scored` are the packed tokens
    that the query tensor has, up to the last one of the pack."""
    first_scored, num_tokens = scored
    table = rule.segments if isinstance(rule.segments, SegmentTable) else _table_of(rule.segments)
    return Part(
        name=rule.name,
        query_tokens=TokenIndex.from_ranges(
            table.queries - first_scored, num_tokens - first_scored
        ),
        key_tokens=TokenIndex.from_ranges(table.keys, num_tokens),
        query_lengths=table.query_lengths,
        key_lengths=table.key_lengths,
        causal=rule.causal,
        rotary=rule.rotary,
        query_cu_seqlens=cu_seqlens(table.query_lengths),
        key_cu_seqlens=cu_seqlens(table.key_lengths),
        window=rule.window,
        is_t2v=rule.is_t2v,
    )


def _table_of(segments: Iterable[Segment]) -> SegmentTable:
    kept = [segment for segment in segments if segment.num_queries and segment.num_keys]
    return SegmentTable(
        range_table(tokens for segment in kept for tokens in segment.queries),
        range_table(tokens for segment in kept for tokens in segment.keys),
        tuple(segment.num_queries for segment in kept),
        tuple(segment.num_keys for segment in kept),
    )


def _share_keys(parts: Iterable[Part]) -> bool:
    if not (ranges := [part.key_tokens.ranges for part in parts]):
        return False
    starts, ends = np.concatenate(ranges).T
    order = starts.argsort()
    return bool((ends[order][:-1] > starts[order][1:]).any())


def cu_seqlens(lengths: Sequence[int]) -> Tensor:
    """Boundaries of segments of those lengths, int32 [segments + 1], on the host."""
    return torch.from_numpy(np.cumsum((0, *lengths), dtype=np.int32))
