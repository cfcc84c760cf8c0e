"""Token counts like those of LLaVA-1.5's mixture of 665,298 instructions, drawn at random.

The shares of its sources are those of the paper's table of data; text lengths are log-normal, with
medians and spreads set by hand for each source's kind of answers (words, sentences, conversations).
6 % of the samples are conversations without an image; all others have one, whose number of visual
tokens is fixed. The real lengths depend on the tokenizer; nothing here is read from the data.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dattn.data.packing import Budgets, choose_pack

MOST_TEXT_TOKENS = 2048

# Thousands of samples, median and log-standard deviation of text tokens, images.
SOURCES = {
    "LLaVA conversations": (158.0, 300, 0.55, 1),
    "ShareGPT": (40.7, 900, 0.9, 0),
    "VQAv2": (83.0, 110, 0.45, 1),
    "GQA": (72.0, 150, 0.45, 1),
    "OKVQA": (9.0, 60, 0.3, 1),
    "OCRVQA": (80.0, 130, 0.35, 1),
    "A-OKVQA": (66.0, 90, 0.3, 1),
    "TextCaps": (22.0, 60, 0.2, 1),
    "RefCOCO": (48.0, 350, 0.5, 1),
    "Visual Genome": (86.0, 380, 0.5, 1),
}


@dataclass(frozen=True)
class SampleLengths:
    """Token counts of samples in the order of a stream: int64 arrays of the same length."""

    visual: np.ndarray
    text: np.ndarray

    @staticmethod
    def join(parts: "Sequence[SampleLengths]") -> "SampleLengths":
        """All samples of several streams."""
        return SampleLengths(
            np.concatenate([part.visual for part in parts]),
            np.concatenate([part.text for part in parts]),
        )

    def budgets(self, images: int) -> Budgets:
        """Budgets in the samples' own proportion: room for so many images, and their text.

        The number of samples is no limit.
        """
        visual = images * int(self.visual.max())
        text = round(visual * self.text.sum() / self.visual.sum())
        return Budgets(visual, max(text, MOST_TEXT_TOKENS), samples=4 * images)


def mixed_lengths(count: int, seed: int, tokens_per_image: int = 729) -> SampleLengths:
    """Samples of all sources in random order."""
    random = np.random.default_rng(seed)
    weights, medians, spreads, images = np.array(list(SOURCES.values())).T
    source = random.choice(len(weights), count, p=weights / weights.sum())
    text = medians[source] * np.exp(spreads[source] * random.standard_normal(count))
    return SampleLengths(
        visual=(images[source] * tokens_per_image).astype(np.int64),
        text=np.clip(text, 12, MOST_TEXT_TOKENS).astype(np.int64),
    )


@dataclass(frozen=True)
class _Sample:
    num_visual_tokens: int
    num_text_tokens: int
    epoch: int = 0


def packs_of(lengths: SampleLengths, budgets: Budgets, look_ahead: int) -> list[np.ndarray]:
    """The packs that a loader process makes of a stream, as long as its buffer is full."""
    stream = _samples(lengths)
    buffer, num_drawn, packs = list(range(look_ahead)), look_ahead, []
    while len(buffer) == look_ahead:
        chosen = choose_pack([stream[i] for i in buffer], budgets, keep_order=False)
        packs.append(np.array([buffer[number] for number in chosen]))
        buffer = [sample for number, sample in enumerate(buffer) if number not in set(chosen)]
        buffer += range(num_drawn, min(len(stream), num_drawn + len(chosen)))
        num_drawn += len(chosen)
    return packs


def first_fit_packs_of(
    lengths: SampleLengths, budgets: Budgets, look_ahead: int
) -> list[np.ndarray]:
    """The packs by first fit over a buffer whose newest pack is kept back, to compare with."""
    stream, start, kept = budgets.sizes(_samples(lengths)), 0, np.empty(0, int)
    packs: list[np.ndarray] = []
    while start + look_ahead - len(kept) <= stream.shape[1]:
        buffer = np.concatenate([kept, np.arange(start, start + look_ahead - len(kept))])
        start += look_ahead - len(kept)
        opened: list[list[int]] = []
        for sample in buffer.tolist():
            fits = (
                pack
                for pack in opened
                if len(pack) < budgets.samples and (stream[:, [*pack, sample]].sum(1) <= 1).all()
            )
            if (pack := next(fits, None)) is None:
                opened.append([sample])
            else:
                pack.append(sample)
        kept = np.array(opened.pop() if len(opened) > 1 else [], int)
        packs += map(np.array, opened)
    return packs


def _samples(lengths: SampleLengths) -> list[_Sample]:
    return [_Sample(*pair) for pair in zip(lengths.visual, lengths.text, strict=True)]


def token_fill(
    lengths: SampleLengths, packs: Sequence[np.ndarray], budgets: Budgets
) -> tuple[float, float]:
    """Shares of the visual and of the text budget that hold tokens, over all packs.

    The fill ratio of a packing is the larger one: that budget binds, and packs of which it is
    all used could not be fewer.
    """
    members = np.concatenate(packs)
    visual = lengths.visual[members].sum() / (len(packs) * budgets.visual)
    text = lengths.text[members].sum() / (len(packs) * budgets.text)
    return float(visual), float(text)
