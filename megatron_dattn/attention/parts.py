"""The attention of one micro-batch as a list of parts, planned once and shared by all layers.

A part is a set of (query rows, key rows) segments under one rule: causal or not, rotary or not. The
paper's T2V and T2T are two parts; their partial softmaxes are merged afterwards (equation 7).
Conventional self-attention is a single causal part over the rows in reading order, which is what a
flash kernel does best and so a fair baseline.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, product

import torch
from torch import Tensor

from megatron_dattn.attention.config import AttentionConfig, Merge
from megatron_dattn.attention.layout import RowRange, TokenLayout
from megatron_dattn.attention.padding import PaddedBatch, padded_batches
from megatron_dattn.attention.rings import image_rings
from megatron_dattn.attention.rows import Rows

T2V = "T2V"


@dataclass(frozen=True)
class Segment:
    """Every query row sees every key row (or, in a causal part, those up to its own place)."""

    queries: tuple[RowRange, ...]
    keys: tuple[RowRange, ...]

    @property
    def num_queries(self) -> int:
        return sum(end - start for start, end in self.queries)

    @property
    def num_keys(self) -> int:
        return sum(end - start for start, end in self.keys)


@dataclass(frozen=True)
class Part:
    """Segments under one rule. No segment is empty; a query row stands in at most one of them."""

    name: str
    query_rows: Rows  # rows of the query tensor, segment after segment
    key_rows: Rows  # rows of the key and value tensors, segment after segment
    query_lengths: tuple[int, ...]  # per segment
    key_lengths: tuple[int, ...]
    causal: bool  # the i-th query of a segment sees its first i + 1 keys; lengths are equal
    rotary: bool
    device: torch.device
    window: int | None = None  # in a causal part: a query sees this many keys at most, the last

    @cached_property
    def query_cu_seqlens(self) -> Tensor:
        """Segment boundaries for variable-length kernels, int32 [segments + 1]."""
        return _cu_seqlens(self.query_lengths, self.device)

    @cached_property
    def key_cu_seqlens(self) -> Tensor:
        return _cu_seqlens(self.key_lengths, self.device)

    @cached_property
    def batches(self) -> tuple[PaddedBatch, ...]:
        """The segments as dense batches, for kernels without variable lengths."""
        return padded_batches(self.query_lengths, self.key_lengths, self.causal, self.device)


@dataclass(frozen=True)
class AttentionPlan:
    """Who attends to whom in one micro-batch, ready for every layer.

    `scored_rows` are the rows that have queries: all of them, or the text rows where visual rows do
    not attend. Query tensors hold those rows alone; key and value tensors hold all.
    """

    num_rows: int
    num_visual_rows: int  # leading rows, padding included
    scored_rows: RowRange
    num_diagonal_rows: int  # leading (visual) rows whose output is their own value, equation 2
    parts: tuple[Part, ...]  # of one joint softmax; T2V too where the merge is "alpha"
    visual_parts: tuple[Part, ...]  # T2V, where the merge leaves it a softmax of its own
    merge: Merge
    device: torch.device

    @property
    def num_scored_rows(self) -> int:
        return self.scored_rows[1] - self.scored_rows[0]

    @cached_property
    def sees_images(self) -> Tensor:
        """Whether a scored row stands in one of `visual_parts`, bool [num_scored_rows]."""
        sees = torch.zeros(self.num_scored_rows, dtype=torch.bool, device=self.device)
        for part in self.visual_parts:
            part.query_rows.put(sees, torch.ones_like(part.query_rows.take(sees)))
        return sees


def plan_attention(
    layout: TokenLayout,
    config: AttentionConfig,
    device: torch.device | str = "cpu",
    *,
    window: int | None = None,
) -> AttentionPlan:
    """Turn a layout and a configuration into parts whose index tensors live on `device`.

    `window` is the sliding window of a layer that has one: a row sees so many of the rows that a
    causal part shows it, itself included. It counts rows of that part: reading order in plain
    self-attention, text or visual rows alone elsewhere. T2V and V2T have no window: an image is not
    far from any text.
    """
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} rows hides a row from itself")
    device = torch.device(device)
    first_scored = 0 if config.scores_visual_rows else layout.visual_budget
    planned = [
        replace(
            build_part(name, list(segments), causal, rotary, first_scored, device),
            window=window if causal else None,
        )
        for name, segments, causal, rotary in _rules(layout, config)
    ]
    parts = tuple(part for part in planned if part.query_lengths)
    apart = [part for part in parts if part.name == T2V and config.merge != "alpha"]
    return AttentionPlan(
        num_rows=layout.num_rows,
        num_visual_rows=layout.visual_budget,
        scored_rows=(first_scored, layout.num_rows),
        num_diagonal_rows=layout.visual_budget if config.v2v == "diagonal" else 0,
        parts=tuple(part for part in parts if part not in apart),
        visual_parts=tuple(apart),
        merge=config.merge,
        device=device,
    )


def _rules(
    layout: TokenLayout, config: AttentionConfig
) -> Iterator[tuple[str, Iterator[Segment], bool, bool]]:
    """(name, segments, causal, rotary) of each part."""
    if config.is_self_attention:
        yield "self-attention", _reading_order(layout), True, True
        return
    yield T2V, _text_to_visual(layout, config), False, config.t2v.rotary
    if config.v2v == "causal":
        yield "V2V and T2T", _within_kind(layout, with_visual=True), True, True
    else:
        yield "T2T", _within_kind(layout, with_visual=False), True, True
    if config.v2v == "ring":
        yield "V2V", _within_rings(layout), False, True
    if config.v2v_window is not None:
        yield "V2V", _within_windows(layout, config.v2v_window // 2), False, True
    if config.v2t != "none":
        yield "V2T", _visual_to_text(layout, config), False, True


def _reading_order(layout: TokenLayout) -> Iterator[Segment]:
    for sample in range(layout.num_samples):
        rows = tuple((run.start, run.end) for run in layout.runs(sample))
        yield Segment(rows, rows)


def _within_kind(layout: TokenLayout, with_visual: bool) -> Iterator[Segment]:
    for sample in range(layout.num_samples):
        if with_visual:
            yield Segment((layout.visual_rows(sample),), (layout.visual_rows(sample),))
        yield Segment((layout.text_rows(sample),), (layout.text_rows(sample),))


def _text_to_visual(layout: TokenLayout, config: AttentionConfig) -> Iterator[Segment]:
    for sample in range(layout.num_samples):
        start, end = layout.visual_rows(sample)
        if config.t2v.scope == "all":
            yield Segment((layout.text_rows(sample),), ((start, end),))
            continue
        seen = start
        for run in layout.runs(sample):
            if run.is_visual:
                seen = run.end
            else:
                yield Segment(((run.start, run.end),), ((start, seen),))


def _within_rings(layout: TokenLayout) -> Iterator[Segment]:
    for image, (start, _) in zip(layout.images, layout.image_rows, strict=True):
        seen = [(layout.visual_rows(image.sample)[0], start)]
        for ring in image_rings(image, start):
            seen += ring
            yield Segment(tuple(ring), tuple(seen))


def _within_windows(layout: TokenLayout, reach: int) -> Iterator[Segment]:
    for image, (start, _) in zip(layout.images, layout.image_rows, strict=True):
        height, width = image.grid
        for i, j in product(range(height), range(width)):
            left, right = max(0, j - reach), min(width, j + reach + 1)
            lines = range(max(0, i - reach), min(height, i + reach + 1))
            keys = tuple((start + k * width + left, start + k * width + right) for k in lines)
            row = start + i * width + j
            yield Segment(((row, row + 1),), keys)


def _visual_to_text(layout: TokenLayout, config: AttentionConfig) -> Iterator[Segment]:
    for sample in range(layout.num_samples):
        start, _ = layout.text_rows(sample)
        prompt_end = start + layout.prompt_length(sample) if config.v2t == "prompt" else start
        before = start
        for run in layout.runs(sample):
            if run.is_visual:
                yield Segment(((run.start, run.end),), ((start, max(before, prompt_end)),))
            else:
                before = run.end


def build_part(
    name: str,
    segments: list[Segment],
    causal: bool,
    rotary: bool,
    first_scored: int,
    device: torch.device,
) -> Part:
    """A part of those segments that are not empty; `first_scored` is query row 0's packed row."""
    segments = [segment for segment in segments if segment.num_queries and segment.num_keys]
    queries = [(a - first_scored, b - first_scored) for s in segments for a, b in s.queries]
    keys = [rows for segment in segments for rows in segment.keys]
    return Part(
        name=name,
        query_rows=Rows.from_ranges(queries, device),
        key_rows=Rows.from_ranges(keys, device),
        query_lengths=tuple(segment.num_queries for segment in segments),
        key_lengths=tuple(segment.num_keys for segment in segments),
        causal=causal,
        rotary=rotary,
        device=device,
    )


def _cu_seqlens(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
