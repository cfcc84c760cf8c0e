"""The prompts that a run and its export are both given: random ones, or a question about files.

Logits are compared over whole texts, and answers over prompts with the image in every place: where
nothing follows an image, readers differ in which of their columns the answer begins from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_dattn.batch import IGNORED_LABEL
from megatron_dattn.data.conversation import IMAGE_TOKEN
from megatron_dattn.data.template import TextTokens
from megatron_dattn.data.tokenizer import token_id
from megatron_dattn.inference.load import RunAssets
from megatron_dattn.inference.prompt import Prompt

_TEXT_TOKENS = 48
# In front of which tokens the images of a random text stand.
_TEXTS = {"no image": (), "one image": (0,), "3 images": (3, 20, 20)}
_PROMPT_TOKENS = 12
# Behind the first token, which every template writes, and then in front of these.
_PLACES = {
    "no image": (),
    "the image first": (1,),
    "the image in the middle": (6,),
    "the image last": (_PROMPT_TOKENS,),
    "images first and last": (1, _PROMPT_TOKENS),
}


@dataclass(frozen=True)
class Asked:
    """A prompt as both sides get it."""

    what: str
    prompt: Prompt
    pixels: Tensor
    """[images, 3, side, side], float32."""

    def input_ids(self, image_id: int, places_per_image: int) -> Tensor:
        """The text with so many `<image>` for each image, int64 [columns]."""
        ids, pieces, before = torch.tensor(self.prompt.tokens.input_ids), [], 0
        for offset in self.prompt.tokens.image_offsets:
            pieces += [ids[before:offset], torch.full((places_per_image,), image_id)]
            before = offset
        return torch.cat([*pieces, ids[before:]])


def asked_question(assets: RunAssets, question: str, images: Sequence[Path]) -> Asked:
    """A user's question, as generation asks it.

    Raises:
        DataError: the question or an image cannot be used.
    """
    prompt = Prompt.from_question(assets, question, images)
    count = {0: "no image", 1: "one image"}.get(len(images), f"{len(images)} images")
    return Asked(f"the question with {count}", prompt, assets.preprocessor.normalise(prompt.pixels))


def random_texts(assets: RunAssets) -> list[Asked]:
    """Texts of random tokens, without an image, with one and with several."""
    return [
        _random(assets, f"a random text with {what}", _TEXT_TOKENS, offsets)
        for what, offsets in _TEXTS.items()
    ]


def random_prompts(assets: RunAssets) -> list[Asked]:
    """Prompts of random tokens with the image in every place, and an image alone."""
    prompts = [
        _random(assets, f"a prompt with {where}", _PROMPT_TOKENS, offsets)
        for where, offsets in _PLACES.items()
    ]
    return [*prompts, _random(assets, "a prompt with the image alone", 1, (1,))]


def _random(assets: RunAssets, what: str, length: int, offsets: tuple[int, ...]) -> Asked:
    """Of any tokens but `<image>`, behind the one that begins every text."""
    generator = torch.Generator().manual_seed(0)
    model, side = assets.config.model, assets.config.model.vision.image_size
    # Not the whole vocabulary: `<image>` is no text.
    ids = torch.randint(model.language.vocab_size - 1, (length,), generator=generator)
    ids += ids >= token_id(assets.tokenizer, IMAGE_TOKEN)
    if assets.tokenizer.bos_token_id is not None:
        ids[0] = assets.tokenizer.bos_token_id
    size = (len(offsets), side, side, 3)
    images = torch.randint(256, size, dtype=torch.uint8, generator=generator).numpy()
    tokens = TextTokens(ids.tolist(), [IGNORED_LABEL] * length, offsets)
    prompt = Prompt(tokens, tuple(images))
    return Asked(what, prompt, assets.preprocessor.normalise(prompt.pixels))
