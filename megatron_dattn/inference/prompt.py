"""What is asked: a question as text tokens, and its images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.batch import IGNORED_LABEL, PackedBatch
from megatron_dattn.data.conversation import IMAGE_TOKEN, Conversation, Turn, require_unicode
from megatron_dattn.data.image_files import read_image_file
from megatron_dattn.data.rejection import SampleError
from megatron_dattn.data.template import TextTokens
from megatron_dattn.errors import DataError, quoted
from megatron_dattn.inference.load import LoadedModel, RunAssets, model_device
from megatron_dattn.models.kv_cache import KeyValue
from megatron_dattn.models.vlm import DAttnVLM


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """What text reads of an image, in every layer that sees images.

    The images of one `encode_images` call share their memory: it is free when all are dropped.
    """

    pixels: np.ndarray
    """uint8 [image_size, image_size, 3]: the image as the vision encoder got it."""
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
    """In reading order: uint8 [image_size, image_size, 3], or what `encode_images` made of it."""

    @classmethod
    def from_question(
        cls, loaded: RunAssets, question: str, images: Sequence[str | Path | EncodedImage] = ()
    ) -> "Prompt":
        """Encode a question about images, which stand in front of it.

        Args:
            images: files, or what `encode_images` made of them.

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
            given = tuple(
                image if isinstance(image, EncodedImage) else read_image(loaded, Path(image))
                for image in images
            )
        except SampleError as error:
            raise DataError(f"{quoted(question)}: {error}") from error
        return cls(tokens, given)

    @property
    def pixels(self) -> list[np.ndarray]:
        """Of all images, encoded or not."""
        return [i.pixels if isinstance(i, EncodedImage) else i for i in self.images]


def read_image(loaded: RunAssets, path: Path) -> np.ndarray:
    """An image file at the vision encoder's size. Raises DataError if it cannot be used."""
    where = ""
    try:
        data = read_image_file(str(path.parent), path.name)  # its errors name the file
        where = f"image {quoted(str(path))}: "
        return loaded.preprocessor.fit(data)
    except SampleError as error:
        raise DataError(f"{where}{error}") from error
    except MemoryError as error:
        raise DataError(f"memory ran out while decoding image '{path}'") from error


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
