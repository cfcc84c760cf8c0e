"""The demo's model and a batch of its shape, for timing: random pixels, ids and labels."""

from dataclasses import dataclass
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase

from examples.quickstart.language_backbone import language_config
from examples.quickstart.vision_backbone import vision_config
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.batch import IGNORED_LABEL, PackedBatch
from megatron_dattn.conversion.families import mistral, siglip
from megatron_dattn.models.config import ModelConfig

VOCAB_SIZE = 448
TEXT_LENGTHS = (12, 44)
SUPERVISED_SHARE = 0.4
_FIRST_WORD = 16  # ids before it are special


@dataclass(frozen=True)
class Vocabulary:
    """What language_config asks of a tokenizer."""

    bos_token_id: int = 1
    eos_token_id: int = 2

    def __len__(self) -> int:
        return VOCAB_SIZE


_VOCABULARY = cast(PreTrainedTokenizerBase, Vocabulary())


def demo_model(attention: str) -> ModelConfig:
    """The sizes of the demo's model."""
    return ModelConfig(
        vision=siglip.vision_config(vision_config(grid=2).to_dict()),
        language=mistral.language_config(language_config(_VOCABULARY).to_dict()),
        attention=attention,
    )


def make_batch(
    model: ModelConfig, samples: int, text_lengths: tuple[int, int] = TEXT_LENGTHS
) -> PackedBatch:
    """One pack of one-image samples; the image stands behind the first token.

    Args:
        text_lengths: the shortest text of a sample, and what all are shorter than.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(*text_lengths, (samples,), generator=generator)
    text_budget = -(-int(lengths.sum()) // 16) * 16
    ids = torch.randint(_FIRST_WORD, VOCAB_SIZE, (text_budget,), generator=generator)
    labels = ids.roll(-1)
    unlabelled = torch.rand(text_budget, generator=generator) > SUPERVISED_SHARE
    ends = lengths.cumsum(0)
    labels[unlabelled] = IGNORED_LABEL
    labels[ends - 1] = IGNORED_LABEL
    labels[int(ends[-1]) :] = IGNORED_LABEL
    layout = TokenLayout(
        text_lengths=tuple(lengths.tolist()),
        images=tuple(ImageSpan(i, 1, model.image_grid) for i in range(samples)),
        visual_budget=samples * model.tokens_per_image,
        text_budget=text_budget,
        prompt_lengths=(1,) * samples,  # labels are drawn anywhere behind it
    )
    side = model.vision.image_size
    pixels = torch.randn(samples, 3, side, side, generator=generator)
    return PackedBatch(layout, ids, labels, pixels, [])
