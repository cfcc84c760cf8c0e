"""Text that grows behind a pack: what the newest token of each sample sees, as a plan.

While answers are written, a sample gets one text token after the other. Nothing that was there
before sees them, so the keys and values of earlier tokens stay, and only the new tokens have
queries. Tokens stand in the order in which they came: the pack as it was laid out, then the added
tokens.

A new token comes after all images and all text of its sample. So it sees them all, whatever the
preset's scope, except what a sliding window hides: text, and images where the window counts them
or T2V inherits it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.layout import TokenLayout, TokenRange
from megatron_dattn.attention.plan.parts import AttentionPlan, split_parts
from megatron_dattn.attention.plan.segments import PartRule, Segment, seen_images
from megatron_dattn.attention.positions import token_positions


def plan_decode_step(
    layout: TokenLayout,
    added: Sequence[int],
    num_new: int,
    config: AttentionConfig,
    device: torch.device | str = "cpu",
    *,
    window: int | None = None,
) -> AttentionPlan:
    """The attention of the newest tokens over all tokens.

    Args:
        layout: the pack, which may have padding.
        added: the sample of each added token, oldest first.
        num_new: how many of the last ones are new, each of another sample; they are the scored
            tokens.
        window: as for `plan_attention`.
    """
    device = torch.device(device)
    first_scored = layout.num_tokens + len(added) - num_new
    grown = _added_tokens(layout, added, added[len(added) - num_new :])
    assert len(grown) == num_new, "two new tokens of one sample would see each other"

    rules = _rules(layout, config, grown, first_scored, window)
    joint, apart = split_parts(rules, config.merge, first_scored, device)
    return AttentionPlan(
        num_tokens=layout.num_tokens + len(added),
        num_visual_tokens=layout.visual_budget,
        scored_tokens=(first_scored, first_scored + num_new),
        num_diagonal_tokens=0,
        parts=joint,
        visual_parts=apart,
        merge=config.merge,
        device=device,
    )


def next_positions(layout: TokenLayout, config: AttentionConfig) -> list[int]:
    """Rotary position of the text token that would follow each sample; one more for each after
    it."""
    longer = replace(
        layout,
        text_lengths=tuple(length + 1 for length in layout.text_lengths),
        text_budget=layout.text_budget + layout.num_samples,
    )
    positions = token_positions(longer, config)
    last = [longer.text_tokens(sample)[1] - 1 for sample in range(layout.num_samples)]
    return positions[last].tolist()


def _added_tokens(
    layout: TokenLayout, added: Sequence[int], samples: Sequence[int]
) -> dict[int, list[TokenRange]]:
    """Packed tokens that those samples have got, in the order of the samples."""
    tokens: dict[int, list[TokenRange]] = {sample: [] for sample in samples}
    for token, sample in enumerate(added, layout.num_tokens):
        if sample in tokens:
            tokens[sample].append((token, token + 1))
    return tokens


def _rules(
    layout: TokenLayout,
    config: AttentionConfig,
    grown: dict[int, list[TokenRange]],
    first_scored: int,
    window: int | None,
) -> Iterator[PartRule]:
    """T2V and T2T of the new tokens, or both as one where they are one softmax in reading order."""
    read = {
        sample: _read(layout, config, sample, tokens, window) for sample, tokens in grown.items()
    }

    def rule(name: str, keys: Iterable[list[TokenRange]], **axes: bool) -> PartRule:
        segments = (
            Segment(((token, token + 1),), tuple(seen))
            for token, seen in enumerate(keys, first_scored)
        )
        return PartRule(name, tuple(segments), **axes)

    if config.attends_in_reading_order:
        yield rule("self-attention", ([*images, *text] for images, text in read.values()))
        return
    images, text = zip(*read.values(), strict=True) if read else ((), ())
    yield rule("T2V", images, rotary=config.t2v.rotary, is_t2v=True)
    yield rule("T2T", text)


def _read(
    layout: TokenLayout,
    config: AttentionConfig,
    sample: int,
    added: list[TokenRange],
    window: int | None,
) -> tuple[list[TokenRange], list[TokenRange]]:
    """Visual and text tokens that a sample's newest token sees; `added` ends with that token
    itself."""
    if config.window_in_reading_order:
        runs = [(run.start, run.end) for run in layout.runs(sample)]
        seen = _last_tokens([*runs, *added], window)
        return (
            [tokens for tokens in seen if tokens[0] < layout.visual_budget],
            [tokens for tokens in seen if tokens[0] >= layout.visual_budget],
        )
    newest = layout.text_lengths[sample] + len(added) - 1
    images = seen_images(layout, config, sample, newest, window)
    return [images], _last_tokens([layout.text_tokens(sample), *added], window)


def _last_tokens(ranges: list[TokenRange], window: int | None) -> list[TokenRange]:
    """The last `window` tokens of some ranges."""
    if window is None:
        return ranges
    kept: list[TokenRange] = []
    for start, end in reversed(ranges):
        start = max(start, end - window)
        window -= end - start
        kept.append((start, end))
        if window == 0:
            break
    return kept[::-1]
