"""Which row of a packed micro-batch is what: the one description everything else is derived from.

A micro-batch is one flat pack of several samples, `[S, 1, H]` with S = visual_budget + text_budget.
Rows 0 .. visual_budget-1 are visual (sample by sample, image by image, patches row-major, then
padding); the rest are text (sample by sample, then padding). An image is not part of the text: its
placeholder token is removed and `ImageSpan.text_offset` remembers the place.

A layout holds host integers only. Data workers make it, ranks send it to each other, and masks,
positions and index tensors are computed from it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

RowRange = tuple[int, int]  # packed rows start .. end-1
TextScope = Literal["all", "following"]  # which text rows see an image: all, or those after it

_HEADER_FIELDS = 4
_IMAGE_FIELDS = 4


@dataclass(frozen=True)
class ImageSpan:
    """One image of a pack: whose it is, where it stands in the text, and its patch grid."""

    sample: int  # index of the sample in the pack
    text_offset: int  # number of text rows of that sample that stand before the image
    grid: tuple[int, int]  # patch rows, patch columns

    @property
    def num_rows(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Run:
    """Neighbouring rows of one kind in a sample's true reading order."""

    start: int  # packed row
    end: int
    is_visual: bool


@dataclass(frozen=True)
class TokenLayout:
    """The samples of one pack and the two row budgets. Raises ValueError when they do not fit."""

    text_lengths: tuple[int, ...]  # valid text rows per sample, at least 1 each
    images: tuple[ImageSpan, ...]  # ordered by (sample, place in the text)
    visual_budget: int
    text_budget: int

    def __post_init__(self) -> None:
        _check_text(self.text_lengths)
        _check_images(self.images, self.text_lengths)
        _check_budget("visual", sum(image.num_rows for image in self.images), self.visual_budget)
        _check_budget("text", sum(self.text_lengths), self.text_budget)

    @property
    def num_samples(self) -> int:
        return len(self.text_lengths)

    @property
    def num_rows(self) -> int:
        """All rows of the pack, padding included."""
        return self.visual_budget + self.text_budget

    @property
    def num_visual_rows(self) -> int:
        """Valid visual rows."""
        return self.visual_cu_seqlens[-1]

    @property
    def num_text_rows(self) -> int:
        """Valid text rows."""
        return self.text_cu_seqlens[-1]

    @cached_property
    def visual_lengths(self) -> tuple[int, ...]:
        """Valid visual rows per sample; 0 for a text-only sample."""
        lengths = [0] * self.num_samples
        for image in self.images:
            lengths[image.sample] += image.num_rows
        return tuple(lengths)

    @cached_property
    def visual_cu_seqlens(self) -> tuple[int, ...]:
        """Boundaries of the samples' visual rows, counted from row 0. num_samples + 1 numbers."""
        return _boundaries(self.visual_lengths)

    @cached_property
    def text_cu_seqlens(self) -> tuple[int, ...]:
        """Boundaries of the samples' text rows, counted from row visual_budget."""
        return _boundaries(self.text_lengths)

    @cached_property
    def image_rows(self) -> tuple[RowRange, ...]:
        """Packed rows of each image."""
        bounds = _boundaries(image.num_rows for image in self.images)
        return tuple(pairwise(bounds))

    def visual_rows(self, sample: int) -> RowRange:
        """Packed rows of all images of a sample."""
        return self.visual_cu_seqlens[sample], self.visual_cu_seqlens[sample + 1]

    def text_rows(self, sample: int) -> RowRange:
        """Packed rows of a sample's text."""
        start, end = self.text_cu_seqlens[sample], self.text_cu_seqlens[sample + 1]
        return self.visual_budget + start, self.visual_budget + end

    def sample_images(self, sample: int) -> tuple[int, ...]:
        """Indices into `images` of a sample's images."""
        return self._images_by_sample[sample]

    def runs(self, sample: int) -> tuple[Run, ...]:
        """The sample as it is read: text and images alternating in their true order.

        Images that follow each other without text between them are one run; no run is empty.
        """
        text_start, text_end = self.text_rows(sample)
        runs: list[Run] = []
        cursor = text_start
        for index in self.sample_images(sample):
            place = text_start + self.images[index].text_offset
            start, end = self.image_rows[index]
            if place > cursor:
                runs.append(Run(cursor, place, is_visual=False))
                cursor = place
            elif runs:
                start = runs.pop().start
            runs.append(Run(start, end, is_visual=True))
        if text_end > cursor:
            runs.append(Run(cursor, text_end, is_visual=False))
        return tuple(runs)

    def output_rows(self, scope: TextScope) -> Tensor:
        """The packed row whose hidden state predicts the label of each text row. [text_budget].

        It is the text row itself, except where text does not see later images (scope
        "following"): a text row directly followed by an image would predict the next text token
        without having seen that image, so the image's last row predicts in its place (the last
        image's, if several follow each other), as in LLaVA.
        """
        rows = torch.arange(self.visual_budget, self.num_rows)
        if scope == "all":
            return rows
        for image, (_, end) in zip(self.images, self.image_rows, strict=True):
            before_image = self.text_cu_seqlens[image.sample] + image.text_offset - 1
            if image.text_offset > 0:
                rows[before_image] = end - 1
        return rows

    def encode(self) -> Tensor:
        """The layout as one int64 vector, for sending between ranks. `decode` inverts it."""
        header = (self.num_samples, len(self.images), self.visual_budget, self.text_budget)
        spans = (n for image in self.images for n in (image.sample, image.text_offset, *image.grid))
        return torch.tensor([*header, *self.text_lengths, *spans], dtype=torch.int64)

    @staticmethod
    def decode(encoded: Tensor) -> "TokenLayout":
        """The layout that `encode` wrote; trailing numbers (a fixed-size buffer) are ignored."""
        numbers = encoded.tolist()
        num_samples, num_images, visual_budget, text_budget = numbers[:_HEADER_FIELDS]
        spans_at = _HEADER_FIELDS + num_samples
        spans_end = spans_at + _IMAGE_FIELDS * num_images
        if len(numbers) < spans_end:
            raise ValueError(
                f"an encoded layout of {num_samples} samples and {num_images} images has "
                f"{spans_end} numbers, but only {len(numbers)} arrived"
            )
        images = (numbers[i : i + _IMAGE_FIELDS] for i in range(spans_at, spans_end, _IMAGE_FIELDS))
        return TokenLayout(
            text_lengths=tuple(numbers[_HEADER_FIELDS:spans_at]),
            images=tuple(ImageSpan(s, offset, (rows, cols)) for s, offset, rows, cols in images),
            visual_budget=visual_budget,
            text_budget=text_budget,
        )

    @cached_property
    def _images_by_sample(self) -> tuple[tuple[int, ...], ...]:
        indices: list[list[int]] = [[] for _ in self.text_lengths]
        for index, image in enumerate(self.images):
            indices[image.sample].append(index)
        return tuple(tuple(of_sample) for of_sample in indices)


def _boundaries(lengths: Iterable[int]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))


def _check_text(text_lengths: tuple[int, ...]) -> None:
    for sample, length in enumerate(text_lengths):
        if length < 1:
            raise ValueError(f"sample {sample} has {length} text rows; every sample needs one")


def _check_images(images: tuple[ImageSpan, ...], text_lengths: tuple[int, ...]) -> None:
    previous = (0, 0)
    for index, image in enumerate(images):
        if not 0 <= image.sample < len(text_lengths):
            raise ValueError(
                f"image {index} belongs to sample {image.sample} of {len(text_lengths)} samples"
            )
        if not 0 <= image.text_offset <= text_lengths[image.sample]:
            raise ValueError(
                f"image {index} stands after {image.text_offset} text rows, but sample "
                f"{image.sample} has {text_lengths[image.sample]}"
            )
        if min(image.grid) < 1:
            raise ValueError(f"image {index} has an empty patch grid {image.grid}")
        if (image.sample, image.text_offset) < previous:
            raise ValueError(
                f"image {index} (sample {image.sample}, text offset {image.text_offset}) comes "
                f"after one at {previous}; images must be ordered by sample, then place"
            )
        previous = (image.sample, image.text_offset)


def _check_budget(kind: str, num_rows: int, budget: int) -> None:
    if num_rows > budget:
        raise ValueError(f"{num_rows} {kind} rows do not fit the {kind} budget of {budget} rows")
