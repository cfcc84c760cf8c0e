"""Images that are encoded once and asked about many times.

Where visual tokens attend to nothing but themselves (V2V diagonal or none), an image's keys and
values in every layer depend on the image alone: not on the question, not on other images, not on
its place in the text, since keys are kept without rotation. So they can be made once, by a pass of
the whole model, and read by any number of prompts.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_dattn.batch import IGNORED_LABEL
from megatron_dattn.data.template import TextTokens
from megatron_dattn.data.videos import Video
from megatron_dattn.errors import ConfigError
from megatron_dattn.inference.load import LoadedModel, model_device
from megatron_dattn.inference.prompt import EncodedImage, Image, Prompt, pack_prompts, read_image
from megatron_dattn.models.kv_cache import KVCache


def can_keep_images(loaded: LoadedModel) -> bool:
    """True if an image's keys and values depend on the image alone."""
    return not loaded.model.attention.scores_visual_tokens


@torch.inference_mode()
def encode_images(
    loaded: LoadedModel, images: Sequence[str | Path | Video | np.ndarray]
) -> tuple[EncodedImage, ...]:
    """Keys and values of images, for `Prompt.from_question(loaded, question, images)`.

    A prompt takes any of them, in any order, beside image files. Answers are those of the files.
    They cost 2 * tokens * key heads * head_dim numbers per image and layer: 96 MB for the 729
    tokens that Mistral-7B reads of an image of SigLIP so400m, in BF16.

    Args:
        images: files, videos, or uint8 [image_size, image_size, 3]; as many squares as fit one
            forward pass.

    Raises:
        ConfigError: visual tokens of the model's preset read other tokens.
        DataError: an image that cannot be used.
    """
    model = loaded.model
    if not can_keep_images(loaded):
        raise ConfigError(
            f"model.attention '{model.model_config.attention}' lets visual tokens attend to "
            "other tokens, so what they become belongs to one prompt and cannot be kept; give "
            "prompts the images themselves"
        )
    if not images:
        return ()
    squares = [
        (image,) if isinstance(image, np.ndarray) else read_image(loaded, image) for image in images
    ]
    pixels = tuple(square for of_image in squares for square in of_image)
    # Text tokens see the images and not the other way round, so any will do to make it a pack.
    pack = Prompt(TextTokens([0], [IGNORED_LABEL], (0,) * len(pixels)), pixels)
    batch = pack_prompts(loaded, [(pack, [])])
    caches = [KVCache() for _ in model.rules]
    attention = model.attention_inputs(batch.layout, model_device(model)).with_caches(caches)
    model.decode(model.adapt(model.encode(batch.pixel_values)), batch, attention)
    visual, kept = batch.layout.num_visual_tokens, sum(rule.sees_images for rule in model.rules)
    lengths = [len(of_image) * visual // len(pixels) for of_image in squares]
    by_layer = [
        [tokens[:visual].split(lengths) for tokens in cache.tokens] for cache in caches[:kept]
    ]
    return tuple(
        EncodedImage(of_image, tuple((keys[i], values[i]) for keys, values in by_layer), model)
        for i, of_image in enumerate(squares)
    )


def encode_once(loaded: LoadedModel, images: Iterable[Image]) -> list[EncodedImage]:
    """The images, encoded; equal ones share an encoding.

    Raises:
        ConfigError: one was encoded by another model, and as for `encode_images`.
    """
    images = list(images)
    new = {image.tobytes(): image for image in images if isinstance(image, np.ndarray)}
    made = dict(zip(new, encode_images(loaded, list(new.values())), strict=True))
    encoded = [i if isinstance(i, EncodedImage) else made[i.tobytes()] for i in images]
    if any(image.model is not loaded.model for image in encoded):
        raise ConfigError("an image was encoded by another model; encode it with the one asked")
    return encoded
