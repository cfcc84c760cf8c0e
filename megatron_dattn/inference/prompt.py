"""What is asked: a question as text tokens, and its images."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.batch import IGNORED_LABEL, PackedBatch
from megatron_dattn.data.conversation import IMAGE_TOKEN, Conversation, Turn, require_unicode
from megatron_dattn.data.policies import Fixes
from megatron_dattn.data.problems import FIXED_BY_DEFAULT
from megatron_dattn.data.rejection import SampleError
from megatron_dattn.data.squares import read_squares
from megatron_dattn.data.template import TextTokens
from megatron_dattn.data.videos import Video
from megatron_dattn.errors import DataError, quoted
from megatron_dattn.inference.load import LoadedModel, RunAssets, model_device
from megatron_dattn.models.kv_cache import KeyValue
from megatron_dattn.models.vlm import DAttnVLM


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """What text reads of an image, in every layer that sees images.

    The images of one `encode_images` call share their memory: it is free when all are dropped.
    """

    squares: tuple[np.ndarray, ...]
    """uint8 [image_size, image_size, 3] each: the image as the vision encoder got it."""
    layers: tuple[KeyValue, ...] = field(repr=False)
    """Key and value of each layer, first to last, [tokens of the image, key heads, head_dim]."""
    model: DAttnVLM = field(repr=False)
    """Who made them; nobody else can read them."""

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values."""
        return sum(tokens.nbytes for layer in self.layers for tokens in layer)


Image = np.ndarray | EncodedImage


@dataclass(frozen=True)
class Prompt:
    """A question as the model gets it."""

    tokens: TextTokens
    images: tuple[Image, ...]
    """In reading order: uint8 [image_size, image_size, 3], or what `encode_images` made of a whole
    image. Each square, of an image or of its tiles, has a place in `tokens.image_offsets`."""

    @classmethod
    def from_question(
        cls,
        loaded: RunAssets,
        question: str,
        images: Sequence[str | Path | Video | EncodedImage] = (),
    ) -> "Prompt":
        """Encode a question about images, which stand in front of it.

        Args:
            images: files, videos, or what `encode_images` made of them.

        Raises:
            DataError: an image that cannot be used, or a question with control tokens or half a
                character.
        """
        if IMAGE_TOKEN in question:
            raise DataError(f"the question contains {IMAGE_TOKEN}; images are given by their files")
        text = f"{IMAGE_TOKEN}\n" * len(images) + question
        names = tuple(f"image {number}" for number in range(len(images)))
        conversation = Conversation((Turn("user", text, len(images)),), names)
        try:
            require_unicode(question)
            tokens = loaded.conversations.prompt(conversation)
        except SampleError as error:
            raise DataError(f"{quoted(question)}: {error}") from error
        parts = [
            (image,) if isinstance(image, EncodedImage) else read_image(loaded, image)
            for image in images
        ]
        numbers = [len(_squares(part)) for part in parts]
        return cls(tokens.repeated(numbers), tuple(image for part in parts for image in part))

    @property
    def pixels(self) -> list[np.ndarray]:
        """Every square, encoded or not, uint8 [image_size, image_size, 3]."""
        return _squares(self.images)


def _squares(images: Iterable[Image]) -> list[np.ndarray]:
    return [
        square
        for image in images
        for square in (image.squares if isinstance(image, EncodedImage) else (image,))
    ]


def read_image(loaded: RunAssets, image: str | Path | Video) -> tuple[np.ndarray, ...]:
    """An image or video as squares of the vision encoder's size, uint8 [image_size, image_size, 3].

    Raises:
        DataError: it cannot be used.
    """
    kind, paths = ("video", image.paths) if isinstance(image, Video) else ("image", (str(image),))
    places = tuple(map(os.path.abspath, paths))
    shown = replace(image, paths=places) if isinstance(image, Video) else places[0]
    name = f"{kind} {quoted(paths[0])}"
    try:
        return tuple(read_squares(shown, os.sep, loaded.preprocessor, Fixes(FIXED_BY_DEFAULT)))
    except SampleError as error:
        # The errors of files that are not there name them.
        is_named = quoted(paths[0]) in str(error) or quoted(places[0]) in str(error)
        where = "" if is_named else f"{name}: "
        raise DataError(f"{where}{error}") from error
    except MemoryError as error:
        raise DataError(f"memory ran out while decoding {name}") from error


def video_of(path: Path) -> Video:
    """A video file, or a folder's files as the frames of a video, by their names."""
    if not path.is_dir():
        return Video((str(path),), is_file=True)
    frames = tuple(sorted(str(frame) for frame in path.iterdir()))
    if not frames:
        raise DataError(f"the folder {quoted(str(path))} has no frames of a video")
    return Video(frames, is_file=False)


def pack_prompts(loaded: LoadedModel, samples: Sequence[tuple[Prompt, list[int]]]) -> PackedBatch:
    """Prompts and what was answered so far, in one pack without padding."""
    pixels = [image for prompt, _ in samples for image in prompt.pixels]
    input_ids = torch.tensor(
        [i for prompt, answer in samples for i in prompt.tokens.input_ids + answer]
    )
    batch = PackedBatch(
        layout=prompt_layout(loaded, samples),
        input_ids=input_ids,
        labels=torch.full_like(input_ids, IGNORED_LABEL),
        pixel_values=loaded.preprocessor.normalise(pixels),
        sample_keys=[str(index) for index in range(len(samples))],
    )
    return batch.to(model_device(loaded.model))


def prompt_layout(loaded: LoadedModel, samples: Sequence[tuple[Prompt, list[int]]]) -> TokenLayout:
    """The layout of such a pack."""
    grid = loaded.model.model_config.image_grid
    spans = tuple(
        ImageSpan(sample=index, text_offset=offset, grid=grid)
        for index, (prompt, _) in enumerate(samples)
        for offset in prompt.tokens.image_offsets
    )
    lengths = tuple(len(prompt.tokens.input_ids) + len(answer) for prompt, answer in samples)
    return TokenLayout(
        text_lengths=lengths,
        images=spans,
        visual_budget=sum(span.num_tokens for span in spans),
        text_budget=sum(lengths),
        prompt_lengths=tuple(len(prompt.tokens.input_ids) for prompt, _ in samples),
    )
