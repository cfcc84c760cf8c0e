"""Text that grows behind a pack: what the newest token of each sample sees, as a plan.

While answers are written, every sample gets one text token after the other. Nothing that was there
before sees them, so the keys and values of earlier tokens stay, and only the new tokens have
queries. Tokens stand in two tables, visual ones and text, with a line per sample; shorter lines are
padded behind their prompt, so that the added tokens of all samples share their columns.

A new token comes after all images and all text of its sample. So it sees them all, whatever the
preset's scope, except what a sliding window hides: text, and images where the window counts them
or T2V inherits it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.plan.index import TokenIndex
from megatron_dattn.attention.positions import token_positions

_PADDING = -1  # no packed token

_NEVER = np.iinfo(np.int64).min
_ALWAYS = np.iinfo(np.int64).max


@dataclass(frozen=True)
class DecodePlan:
    """What the newest token of each sample sees of that sample's tokens."""

    images_bias: Tensor | None
    """Added to the scores: 0 for seen visual tokens, else -inf, [samples, 1, 1, columns]; 0 where a
    sample sees none at all. None if all are seen."""
    text_bias: Tensor | None
    """The same of text tokens; a token sees at least itself."""
    sees_images: Tensor | None
    """Samples whose newest token sees a visual token, bool [samples]. None if all do."""


@dataclass(frozen=True)
class SampleTable:
    """A pack's tokens by sample: numbers of packed tokens, int64 [samples, columns]."""

    table: NDArray[np.int64]  # _PADDING behind the tokens of shorter samples

    @property
    def num_columns(self) -> int:
        return self.table.shape[1]

    @staticmethod
    def visual(layout: TokenLayout) -> "SampleTable":
        """Of visual tokens, in packed order."""
        return _table_of([layout.visual_tokens(sample) for sample in range(layout.num_samples)])

    @staticmethod
    def text(layout: TokenLayout) -> "SampleTable":
        """Of text tokens."""
        return _table_of([layout.text_tokens(sample) for sample in range(layout.num_samples)])

    def take(self, tokens: Tensor) -> Tensor:
        """[packed tokens, ...] to [samples, columns, ...], same dtype; a view where all samples are
        equally long and lie one behind the other. Padding repeats some token of the pack."""
        places = np.maximum(self.table, 0).ravel()
        if len(places) and (np.diff(places) == 1).all():
            index = TokenIndex(len(places), start=int(places[0]))
        else:
            index = TokenIndex(len(places), index=torch.from_numpy(places).to(tokens.device))
        return index.take(tokens).unflatten(0, self.table.shape)


class GrowingText:
    """The samples of a pack in one kind of layer, and what hides their tokens from the newest one.

    Every token has a place, and a window shows the newest token the places behind its own minus the
    window: text tokens count from 0 or, where the window counts all tokens, in reading order.

    Args:
        layout: the pack as the layer sees it (`LayerRule.layout`), which may have padding.
        window: as for `plan_attention`.
    """

    def __init__(
        self, layout: TokenLayout, config: AttentionConfig, *, window: int | None = None
    ) -> None:
        self._window = window
        visual, text = SampleTable.visual(layout).table, SampleTable.text(layout).table
        places = np.full(layout.num_tokens + 1, _NEVER)  # the last one is padding's
        self._newest = np.zeros(layout.num_samples, dtype=np.int64)
        for sample in range(layout.num_samples):
            self._newest[sample] = _set_places(places, layout, config, sample) - 1
        self._visual, self._text = places[visual], places[text]

    def keep(self, samples: Sequence[int]) -> None:
        """Go on with these samples alone."""
        self._visual, self._text = self._visual[samples], self._text[samples]
        self._newest = self._newest[samples]

    def add_token(self) -> None:
        """Give each sample one more token, which is the newest from now on."""
        self._newest = self._newest + 1
        self._text = np.concatenate((self._text, self._newest[:, None]), axis=1)

    def plan(self, device: torch.device | str, dtype: torch.dtype) -> DecodePlan:
        """Say which tokens the newest ones see.

        Args:
            dtype: in which scores are computed.
        """
        first = np.full_like(self._newest, _NEVER)
        if self._window is not None:
            first = self._newest - self._window
        images = np.greater(self._visual, first[:, None])
        text = np.greater(self._text, first[:, None])
        sees = images.any(axis=1)
        return DecodePlan(
            images_bias=_bias(images | ~sees[:, None], device, dtype),
            text_bias=_bias(text, device, dtype),
            sees_images=None if sees.all() else torch.from_numpy(sees).to(device),
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


def _set_places(
    places: NDArray[np.int64], layout: TokenLayout, config: AttentionConfig, sample: int
) -> int:
    """Write the places of a sample's packed tokens; returns the place of its next token."""
    if config.window_in_reading_order:
        place = 0
        for run in layout.runs(sample):
            places[run.start : run.end] = np.arange(run.end - run.start) + place
            place += run.end - run.start
        return place
    start, end = layout.text_tokens(sample)
    places[start:end] = np.arange(end - start)
    for image in layout.sample_images(sample):
        first, last = layout.image_tokens[image]
        # An image leaves an inherited window together with the text token before it.
        inherits = config.t2v.window == "inherit"
        places[first:last] = layout.images[image].text_offset - 1 if inherits else _ALWAYS
    return end - start


def _table_of(ranges: Sequence[tuple[int, int]]) -> SampleTable:
    columns = np.arange(max((end - start for start, end in ranges), default=0))
    starts, ends = np.array(ranges, dtype=np.int64).reshape(-1, 2, 1).transpose(1, 0, 2)
    tokens = starts + columns
    return SampleTable(np.where(tokens < ends, tokens, _PADDING))


def _bias(seen: NDArray[np.bool_], device: torch.device | str, dtype: torch.dtype) -> Tensor | None:
    if seen.all():
        return None
    hidden = ~torch.from_numpy(seen)
    bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return bias[:, None, None].to(device)
