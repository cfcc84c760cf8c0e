"""Text that grows behind a pack: what the newest row of each sample sees, as a plan.

While answers are written, a sample gets one text row after the other. Nothing that was there before
sees them, so the keys and values of earlier rows stay, and only the new rows have queries. Rows
stand in the order in which they came: the pack as it was laid out, then the added rows.

A new row comes after all images and all text of its sample. So it sees them all, whatever the
preset's scope, except what a sliding window hides.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.layout import RowRange, TokenLayout
from megatron_dattn.attention.parts import T2V, AttentionPlan, Part, Segment, build_part
from megatron_dattn.attention.positions import row_positions


def plan_next_rows(
    layout: TokenLayout,
    added: Sequence[int],
    num_new: int,
    config: AttentionConfig,
    device: torch.device | str = "cpu",
    *,
    window: int | None = None,
) -> AttentionPlan:
    """The attention of the newest rows over all rows.

    Args:
        layout: the pack, which may have padding.
        added: the sample of each added row, oldest first.
        num_new: how many of the last ones are new, each of another sample; they are the scored
            rows.
        window: as for `plan_attention`.
    """
    device = torch.device(device)
    first_scored = layout.num_rows + len(added) - num_new
    grown = _added_rows(layout, added, added[len(added) - num_new :])
    assert len(grown) == num_new, "two new rows of one sample would see each other"

    def part(name: str, rotary: bool, keys: Iterable[Sequence[RowRange]]) -> Part:
        segments = [
            Segment(((row, row + 1),), tuple(seen)) for row, seen in enumerate(keys, first_scored)
        ]
        return build_part(name, segments, False, rotary, first_scored, device)

    text = (_last_rows([*_read(layout, config, s), *rows], window) for s, rows in grown.items())
    parts = [part("T2T", True, text)]
    apart: list[Part] = []
    if not config.is_self_attention:
        images = part(T2V, config.t2v.rotary, ([layout.visual_rows(s)] for s in grown))
        if images.query_lengths:
            (parts if config.merge == "alpha" else apart).insert(0, images)
    return AttentionPlan(
        num_rows=layout.num_rows + len(added),
        num_visual_rows=layout.visual_budget,
        scored_rows=(first_scored, first_scored + num_new),
        num_diagonal_rows=0,
        parts=tuple(parts),
        visual_parts=tuple(apart),
        merge=config.merge,
        device=device,
    )


def next_positions(layout: TokenLayout, config: AttentionConfig) -> list[int]:
    """Rotary position of the text row that would follow each sample; one more for each after it."""
    longer = replace(
        layout,
        text_lengths=tuple(length + 1 for length in layout.text_lengths),
        text_budget=layout.text_budget + layout.num_samples,
    )
    positions = row_positions(longer, config)
    last = [longer.text_rows(sample)[1] - 1 for sample in range(layout.num_samples)]
    return positions[last].tolist()


def _added_rows(
    layout: TokenLayout, added: Sequence[int], samples: Sequence[int]
) -> dict[int, list[RowRange]]:
    """Packed rows that those samples have got, in the order of the samples."""
    rows: dict[int, list[RowRange]] = {sample: [] for sample in samples}
    for row, sample in enumerate(added, layout.num_rows):
        if sample in rows:
            rows[sample].append((row, row + 1))
    return rows


def _read(layout: TokenLayout, config: AttentionConfig, sample: int) -> list[RowRange]:
    """What a sample had before it grew and a window counts: its text, or all it read as text."""
    if config.is_self_attention:
        return [(run.start, run.end) for run in layout.runs(sample)]
    return [layout.text_rows(sample)]


def _last_rows(ranges: list[RowRange], window: int | None) -> list[RowRange]:
    """The last `window` rows of some ranges."""
    if window is None:
        return ranges
    kept: list[RowRange] = []
    for start, end in reversed(ranges):
        start = max(start, end - window)
        window -= end - start
        kept.append((start, end))
        if window == 0:
            break
    return kept[::-1]
