"""What travels from the data workers to the model: encoded samples and the packs made of them.

Energon tracks what its loaders give out by two attributes, `__key__` and `__restore_key__`; so
packs have them, though nothing is restored by them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.batch import IGNORED_LABEL, PackedBatch
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.data.rejection import Reason, Rejection
from megatron_dattn.errors import UserError


@dataclass
class EncodedSample:
    """One conversation as text tokens, and the squares of its images, still as bytes.

    What a square is: see `ImagePreprocessor`. For the model each is an image.
    """

    key: str
    position: int  # in the sequence that all streams share
    epoch: int  # in which the sample takes its turn, counted from 0
    input_ids: np.ndarray  # int64 [text tokens]
    labels: (
        np.ndarray
    )  # int64 [text tokens]: the next token if it is supervised, else IGNORED_LABEL
    image_offsets: tuple[int, ...]  # per image: text tokens before it
    images: list[np.ndarray]  # uint8 [image_size, image_size, 3] each
    grid: tuple[int, int]  # patch rows, patch columns of every image
    fixed: frozenset[Reason] = frozenset()
    """Problems of the record that were fixed."""

    @property
    def num_text_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_visual_tokens(self) -> int:
        return len(self.images) * self.grid[0] * self.grid[1]


@dataclass
class RejectedSample:
    """A sample that cannot be used; it takes its turn in the stream so that it is counted once."""

    position: int
    rejection: Rejection


@dataclass
class LoadedPack:
    """What a worker sends: a batch, or a rejected sample.

    Or the error that ended its work: raised in the worker, it would arrive as a traceback.
    """

    batch: PackedBatch | None = None
    rejections: tuple[Rejection, ...] = ()
    failure: UserError | None = None
    fixed: tuple[Reason, ...] = ()
    """The problems that were fixed in the batch's samples, each as often as in samples."""
    stream: int = 0
    """Of the rank's streams, the one that it is from."""
    num_drawn: int = 0
    """Positions that the stream has drawn since it began, up to this pack."""
    waiting: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64: those of them that wait in the packing buffer, in their order."""
    __key__: str = ""
    __restore_key__: tuple[Any, ...] = ()

    def pin_memory(self) -> "LoadedPack":
        return replace(self, batch=self.batch and self.batch.pin_memory())


def build_batch(
    samples: Sequence[EncodedSample],
    *,
    preprocessor: ImagePreprocessor,
    visual_budget: int,
    text_budget: int,
    pad_id: int,
) -> PackedBatch:
    """Put samples into one pack, in their order. Raises ValueError if they exceed a budget."""
    layout = TokenLayout(
        text_lengths=tuple(sample.num_text_tokens for sample in samples),
        images=tuple(
            ImageSpan(sample=index, text_offset=offset, grid=sample.grid)
            for index, sample in enumerate(samples)
            for offset in sample.image_offsets
        ),
        visual_budget=visual_budget,
        text_budget=text_budget,
        prompt_lengths=tuple(_prompt_length(sample.labels) for sample in samples),
    )
    images = [image for sample in samples for image in sample.images]
    return PackedBatch(
        layout=layout,
        input_ids=_padded([sample.input_ids for sample in samples], text_budget, pad_id),
        labels=_padded([sample.labels for sample in samples], text_budget, IGNORED_LABEL),
        pixel_values=preprocessor.stack(images),
        pixel_scale=preprocessor.pixel_scale,
        sample_keys=[sample.key for sample in samples],
    )


def _prompt_length(labels: np.ndarray) -> int:
    """Leading tokens that no label teaches to predict: up to the first token that has a label."""
    supervised = np.flatnonzero(labels != IGNORED_LABEL)
    return int(supervised[0]) + 1 if len(supervised) else len(labels)


def _padded(tokens: list[np.ndarray], length: int, fill: int) -> Tensor:
    padded = np.full(length, fill, dtype=np.int64)
    valid = np.concatenate(tokens)
    padded[: len(valid)] = valid
    return torch.from_numpy(padded)
