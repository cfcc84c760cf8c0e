"""Which tokens see which, as segments: the rules that a plan is made of.

A rule is one of the kinds of pairs V2V, V2T, T2V and T2T, or several of them that one causal mask
covers. Its segments say it of whole ranges of tokens, so that a plan costs a few of them per sample
and not one per pair.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.layout import TokenLayout, TokenRange
from megatron_dattn.attention.plan.patches import (
    SegmentTable,
    segments_within_rings,
    segments_within_windows,
)


@dataclass(frozen=True)
class Segment:
    """Every query token sees every key token (or, in a causal part, those up to its own place)."""

    queries: tuple[TokenRange, ...]
    keys: tuple[TokenRange, ...]

    @property
    def num_queries(self) -> int:
        return sum(end - start for start, end in self.queries)

    @property
    def num_keys(self) -> int:
        return sum(end - start for start, end in self.keys)


@dataclass(frozen=True)
class PartRule:
    """Segments that follow one rule; some may be empty."""

    name: str
    segments: tuple[Segment, ...] | SegmentTable
    causal: bool = False
    rotary: bool = True
    window: int | None = None  # of a causal rule
    is_t2v: bool = False  # text tokens read images, and nothing else


def attention_rules(
    layout: TokenLayout, config: AttentionConfig, window: int | None
) -> Iterator[PartRule]:
    """The rules of a layer with that sliding window, or none."""
    if config.attends_in_reading_order:
        segments = tuple(_reading_order(layout))
        yield PartRule("self-attention", segments, causal=True, window=window)
        return
    if config.window_in_reading_order and window is not None:
        yield from windowed_text_rules(layout, config, window)
        return
    yield PartRule(
        "T2V", tuple(_text_to_visual(layout, config, window)), rotary=config.t2v.rotary, is_t2v=True
    )
    visual_too = config.v2v == "causal"
    name = "V2V and T2T" if visual_too else "T2T"
    yield PartRule(name, tuple(_within_kind(layout, visual_too)), causal=True, window=window)
    if config.v2v == "ring":
        yield PartRule("V2V", segments_within_rings(layout))
    if config.v2v_window is not None:
        yield PartRule("V2V", segments_within_windows(layout, config.v2v_window // 2))
    if config.v2t != "none":
        yield PartRule("V2T", tuple(_visual_to_text(layout, config)))


def seen_images(
    layout: TokenLayout, config: AttentionConfig, sample: int, token: int, window: int | None
) -> TokenRange:
    """Packed tokens of the images that a sample's text token `token`, counted from 0, sees.

    The token may be one that the text does not have yet. A layer's window hides images only where
    t2v.window says so: then those with `window` text tokens or more from the image to the token.
    """
    start, end = layout.visual_tokens(sample)
    for index in layout.sample_images(sample):
        offset, (first, last) = layout.images[index].text_offset, layout.image_tokens[index]
        if config.t2v.scope == "following" and offset > token:
            end = min(end, first)
        if config.t2v.window == "inherit" and window is not None and offset <= token - window + 1:
            start = last
    return start, max(start, end)


def windowed_text_rules(
    layout: TokenLayout, config: AttentionConfig, window: int
) -> Iterator[PartRule]:
    """T2V and T2T under a window that counts all tokens in reading order, without visual queries.

    What a text token sees of its own run of text is a causal part. Of what stands before that run,
    neighbouring tokens share the keys that all of them see; and at the window's edge each token
    sees one key less than the one before it, which is a causal triangle when it is read backwards.
    """
    within: list[Segment] = []
    shared: dict[bool, list[Segment]] = {True: [], False: []}  # by whether the keys are visual
    edges: dict[bool, list[Segment]] = {True: [], False: []}
    for order in (_ReadingOrder(layout, sample) for sample in range(layout.num_samples)):
        for first, end in order.text_runs():
            tokens = order.tokens(first, end, visual=False)
            within.append(Segment(tokens, tokens))
            for a, b in order.pieces(first, end, window):
                low, high = a - window + 1, b - window  # what token a and token b - 1 see first
                queries = order.tokens(a, b, visual=False)
                leaving = _backwards(order.tokens(a, b - 1, visual=False))
                for visual in (True, False):
                    keys = order.tokens(max(high, 0), first, visual=visual)
                    shared[visual].append(Segment(queries, keys))
                    if low >= 0 and (keys := order.tokens(low, high, visual=visual)):
                        edges[visual].append(Segment(leaving, _backwards(keys)))
    for visual, name in ((True, "T2V"), (False, "T2T")):
        rotary = config.t2v.rotary or not visual
        yield PartRule(name, tuple(shared[visual]), rotary=rotary, is_t2v=visual)
        yield PartRule(name, tuple(edges[visual]), True, rotary, is_t2v=visual)
    yield PartRule("T2T", tuple(within), causal=True, window=window)


class _ReadingOrder:
    """A sample's valid tokens by their place in reading order, 0 for the first."""

    def __init__(self, layout: TokenLayout, sample: int) -> None:
        self._runs = layout.runs(sample)
        lengths = (run.end - run.start for run in self._runs)
        self._starts = list(accumulate(lengths, initial=0))

    def text_runs(self) -> list[TokenRange]:
        """Places of every run of text."""
        places = zip(self._runs, pairwise(self._starts), strict=True)
        return [run_places for run, run_places in places if not run.is_visual]

    def tokens(self, first: int, end: int, *, visual: bool) -> tuple[TokenRange, ...]:
        """Packed tokens of one kind at the places first .. end - 1."""
        found = []
        for run, start in zip(self._runs, self._starts[:-1], strict=True):
            a, b = run.start + max(first - start, 0), min(run.start + end - start, run.end)
            if run.is_visual is visual and a < b:
                found.append((a, b))
        return tuple(found)

    def pieces(self, first: int, end: int, window: int) -> list[TokenRange]:
        """The places of a run of text that see tokens before it, cut where the window's edge passes
        from one run to the next."""
        last = min(end, first + window - 1)
        cuts = {start + window - 1 for start in self._starts}
        return list(pairwise(sorted({first, last} | {c for c in cuts if first < c < last})))


def _backwards(ranges: tuple[TokenRange, ...]) -> tuple[TokenRange, ...]:
    return tuple((token, token + 1) for a, b in reversed(ranges) for token in reversed(range(a, b)))


def _reading_order(layout: TokenLayout) -> Iterator[Segment]:
    for sample in range(layout.num_samples):
        tokens = tuple((run.start, run.end) for run in layout.runs(sample))
        yield Segment(tokens, tokens)


def _within_kind(layout: TokenLayout, with_visual: bool) -> Iterator[Segment]:
    for sample in range(layout.num_samples):
        if with_visual:
            yield Segment((layout.visual_tokens(sample),), (layout.visual_tokens(sample),))
        yield Segment((layout.text_tokens(sample),), (layout.text_tokens(sample),))


def _text_to_visual(
    layout: TokenLayout, config: AttentionConfig, window: int | None
) -> Iterator[Segment]:
    for sample in range(layout.num_samples):
        start, end = layout.text_tokens(sample)
        cuts = {0, end - start}  # tokens from which on another range of images is seen
        for offset in (layout.images[index].text_offset for index in layout.sample_images(sample)):
            if config.t2v.scope == "following":
                cuts.add(offset)
            if config.t2v.window == "inherit" and window is not None:
                cuts.add(min(offset + window - 1, end - start))
        for first, last in pairwise(sorted(cuts)):
            keys = seen_images(layout, config, sample, first, window)
            yield Segment(((start + first, start + last),), (keys,))


def _visual_to_text(layout: TokenLayout, config: AttentionConfig) -> Iterator[Segment]:
    for sample in range(layout.num_samples):
        start, _ = layout.text_tokens(sample)
        prompt_end = start + layout.prompt_length(sample) if config.v2t == "prompt" else start
        before = start
        for run in layout.runs(sample):
            if run.is_visual:
                yield Segment(((run.start, run.end),), ((start, max(before, prompt_end)),))
            else:
                before = run.end
