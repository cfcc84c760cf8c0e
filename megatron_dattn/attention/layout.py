"""Which token of a packed micro-batch is what: the one description everything else is derived from.

A micro-batch is one flat pack of several samples, `[S, 1, H]` with S = visual_budget + text_budget.
Tokens 0 .. visual_budget-1 are visual (sample by sample, image by image, patches row-major, then
padding); the rest are text (sample by sample, then padding). An image is not part of the text: its
placeholder token is removed and `ImageSpan.text_offset` remembers the place.

A layout holds host integers only. Data workers make it, ranks send it to each other, and masks,
positions and index tensors are computed from it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

TokenRange = tuple[int, int]  # packed tokens start .. end-1

_HEADER_FIELDS = 5
_IMAGE_FIELDS = 4


@dataclass(frozen=True)
class ImageSpan:
    """One image of a pack: whose it is, where it stands in the text, and its patch grid."""

    sample: int  # index of the sample in the pack
    text_offset: int  # number of text tokens of that sample that stand before the image
    grid: tuple[int, int]  # patch rows, patch columns

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class TokenRun:
    """Neighbouring tokens of one kind in a sample's true reading order."""

    start: int  # packed token
    end: int
    images: tuple[int, ...] = ()  # indices into `TokenLayout.images`; none for text

    @property
    def is_visual(self) -> bool:
        return bool(self.images)


@dataclass(frozen=True)
class TokenLayout:
    """The samples of one pack and the two token budgets. Raises ValueError when they do not fit."""

    text_lengths: tuple[int, ...]  # valid text tokens per sample, at least 1 each
    images: tuple[ImageSpan, ...]  # ordered by (sample, place in the text)
    visual_budget: int
    text_budget: int
    # Leading text tokens per sample that are nobody's label: up to and with the token that predicts
    # the first supervised token. None where nobody needs it.
    prompt_lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_text(self.text_lengths)
        _check_prompts(self.prompt_lengths, self.text_lengths)
        _check_images(self.images, self.text_lengths)
        _check_budget("visual", sum(image.num_tokens for image in self.images), self.visual_budget)
        _check_budget("text", sum(self.text_lengths), self.text_budget)

    @property
    def num_samples(self) -> int:
        return len(self.text_lengths)

    @property
    def num_tokens(self) -> int:
        """All tokens of the pack, padding included."""
        return self.visual_budget + self.text_budget

    @property
    def num_visual_tokens(self) -> int:
        """Valid visual tokens."""
        return self.visual_cu_seqlens[-1]

    @property
    def num_text_tokens(self) -> int:
        """Valid text tokens."""
        return self.text_cu_seqlens[-1]

    @cached_property
    def visual_lengths(self) -> tuple[int, ...]:
        """Valid visual tokens per sample; 0 for a text-only sample."""
        lengths = [0] * self.num_samples
        for image in self.images:
            lengths[image.sample] += image.num_tokens
        return tuple(lengths)

    @cached_property
    def visual_cu_seqlens(self) -> tuple[int, ...]:
        """Boundaries of the samples' visual tokens, counted from token 0. num_samples + 1
        numbers."""
        return _boundaries(self.visual_lengths)

    @cached_property
    def text_cu_seqlens(self) -> tuple[int, ...]:
        """Boundaries of the samples' text tokens, counted from token visual_budget."""
        return _boundaries(self.text_lengths)

    @cached_property
    def image_tokens(self) -> tuple[TokenRange, ...]:
        """Packed tokens of each image."""
        bounds = _boundaries(image.num_tokens for image in self.images)
        return tuple(pairwise(bounds))

    def visual_tokens(self, sample: int) -> TokenRange:
        """Packed tokens of all images of a sample."""
        return self.visual_cu_seqlens[sample], self.visual_cu_seqlens[sample + 1]

    def text_tokens(self, sample: int) -> TokenRange:
        """Packed tokens of a sample's text."""
        start, end = self.text_cu_seqlens[sample], self.text_cu_seqlens[sample + 1]
        return self.visual_budget + start, self.visual_budget + end

    def prompt_length(self, sample: int) -> int:
        """Text tokens of a sample's prompt. Raises ValueError if the layout does not know them."""
        if self.prompt_lengths is None:
            raise ValueError(
                "this layout has no prompt_lengths, which attention with v2t='prompt' needs"
            )
        return self.prompt_lengths[sample]

    def sample_images(self, sample: int) -> tuple[int, ...]:
        """Indices into `images` of a sample's images."""
        return self._images_by_sample[sample]

    def runs(self, sample: int) -> tuple[TokenRun, ...]:
        """The sample as it is read: text and images alternating in their true order.

        Images that follow each other without text between them are one run; no run is empty.
        """
        text_start, text_end = self.text_tokens(sample)
        runs: list[TokenRun] = []
        cursor = text_start
        for index in self.sample_images(sample):
            place = text_start + self.images[index].text_offset
            start, end = self.image_tokens[index]
            together: tuple[int, ...] = ()
            if place > cursor:
                runs.append(TokenRun(cursor, place))
                cursor = place
            elif runs:
                previous = runs.pop()
                start, together = previous.start, previous.images
            runs.append(TokenRun(start, end, (*together, index)))
        if text_end > cursor:
            runs.append(TokenRun(cursor, text_end))
        return tuple(runs)

    def encode(self) -> Tensor:
        """The layout as one vector, int64 [n], for sending between ranks. `decode` inverts it."""
        prompts = self.prompt_lengths
        header = (self.num_samples, len(self.images), self.visual_budget, self.text_budget)
        spans = (n for image in self.images for n in (image.sample, image.text_offset, *image.grid))
        return torch.tensor(
            [*header, int(prompts is not None), *self.text_lengths, *spans, *(prompts or ())],
            dtype=torch.int64,
        )

    @staticmethod
    def decode(encoded: Tensor) -> "TokenLayout":
        """The layout that `encode` wrote, int64 [n or more]: numbers behind it are ignored."""
        numbers = encoded.tolist()
        num_samples, num_images, visual_budget, text_budget, prompts = numbers[:_HEADER_FIELDS]
        spans_at = _HEADER_FIELDS + num_samples
        spans_end = spans_at + _IMAGE_FIELDS * num_images
        end = spans_end + num_samples * prompts
        if len(numbers) < end:
            raise ValueError(
                f"an encoded layout of {num_samples} samples and {num_images} images has "
                f"{end} numbers, but only {len(numbers)} arrived"
            )
        images = (numbers[i : i + _IMAGE_FIELDS] for i in range(spans_at, spans_end, _IMAGE_FIELDS))
        return TokenLayout(
            text_lengths=tuple(numbers[_HEADER_FIELDS:spans_at]),
            images=tuple(
                ImageSpan(s, offset, (tokens, cols)) for s, offset, tokens, cols in images
            ),
            visual_budget=visual_budget,
            text_budget=text_budget,
            prompt_lengths=tuple(numbers[spans_end:end]) if prompts else None,
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
            raise ValueError(f"sample {sample} has {length} text tokens; every sample needs one")


def _check_prompts(prompt_lengths: tuple[int, ...] | None, text_lengths: tuple[int, ...]) -> None:
    if prompt_lengths is None:
        return
    if len(prompt_lengths) != len(text_lengths):
        raise ValueError(f"{len(prompt_lengths)} prompt lengths for {len(text_lengths)} samples")
    for sample, (prompt, text) in enumerate(zip(prompt_lengths, text_lengths, strict=True)):
        if not 0 <= prompt <= text:
            raise ValueError(f"sample {sample} has {prompt} prompt tokens, but {text} text tokens")


def _check_images(images: tuple[ImageSpan, ...], text_lengths: tuple[int, ...]) -> None:
    previous = (0, 0)
    for index, image in enumerate(images):
        if not 0 <= image.sample < len(text_lengths):
            raise ValueError(
                f"image {index} belongs to sample {image.sample} of {len(text_lengths)} samples"
            )
        if not 0 <= image.text_offset <= text_lengths[image.sample]:
            raise ValueError(
                f"image {index} stands after {image.text_offset} text tokens, but sample "
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


def _check_budget(kind: str, num_tokens: int, budget: int) -> None:
    if num_tokens > budget:
        raise ValueError(
            f"{num_tokens} {kind} tokens do not fit the {kind} budget of {budget} tokens"
        )
