"""Gemma-2 with images in its text equals Hugging Face's, as far as that has images: `s_attn`.

No Hugging Face class joins an encoder to Gemma-2 as we do, but its decoder takes tokens instead of
tokens. Tokens of images then stand in reading order among those of the text, and window, scale and
softcap apply to both kinds.

transformers 5 multiplies by sqrt(hidden_size) in its embedding, so that tokens which are handed in
come scaled already (transformers 4 multiplied them, too).
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_dattn.batch import PackedBatch
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.vlm import DAttnVLM
from tests.support.vlm import load_hugging_face, make_batch, tiny_model, tiny_model_config
from tests.unit.models.test_language_families import follow_the_dtype, hugging_face

pytestmark = pytest.mark.usefixtures("one_process")

TEXTS = [9, 4, 8]
IMAGES = [(3,), (), (0, 5, 8)]
BUDGETS = (36, 24)
# Shorter than the nine tokens of an image.
CONFIG = tiny_model_config("s_attn", family="gemma2", num_hidden_layers=3, sliding_window=5)


def reading_order(text: Tensor, images: Tensor, offsets: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The tokens of a sample, and which of them are text.

    Args:
        text: [text tokens, H].
        images: [images, tokens, H].
        offsets: how many text tokens stand in front of each image.
    """
    tokens, is_text = [], []
    for place in range(len(text) + 1):
        for image, offset in zip(images, offsets, strict=True):
            if offset == place:
                tokens.append(image)
                is_text += [False] * len(image)
        tokens.append(text[place : place + 1])
        is_text += [True] * len(text[place : place + 1])
    return torch.cat(tokens), torch.tensor(is_text)


@torch.no_grad()
def both_logits(
    ours: DAttnVLM, theirs: PreTrainedModel, batch: PackedBatch
) -> list[tuple[Tensor, Tensor]]:
    """At the text tokens of every sample, [text tokens, vocabulary]."""
    scale = ours.model_config.language.hidden_size**0.5
    visual = ours.adapter.project(ours.vision_model(batch.pixel_values))
    visual = visual * torch.tensor(scale, dtype=torch.float32).to(visual)
    embed, pairs, first = theirs.get_input_embeddings(), [], 0
    for sample, offsets in enumerate(IMAGES):
        start, end = batch.layout.text_tokens(sample)
        text = embed(batch.input_ids[start - BUDGETS[0] : end - BUDGETS[0]])  # scaled
        images = visual[first : first + len(offsets)]
        first += len(offsets)
        tokens, is_text = reading_order(text, images, offsets)
        expected = theirs(inputs_embeds=tokens[None]).logits[0][is_text]
        pairs.append((ours.forward_logits(batch, torch.arange(start, end)), expected))
    return pairs


def compared(config: ModelConfig, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    ours, theirs = tiny_model(config).to(dtype), hugging_face(config.language).to(dtype)
    load_hugging_face(ours, text=theirs.state_dict())
    batch = make_batch(TEXTS, IMAGES, budgets=BUDGETS)
    batch.pixel_values = batch.pixel_values.to(dtype)
    return both_logits(ours, theirs, batch)


def test_logits_equal_hugging_face():
    for logits, expected in compared(CONFIG, torch.float32):
        # fp32 sums in another order, through three layers; logits are capped at 2.
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_logits_equal_hugging_face_in_float64(monkeypatch):
    follow_the_dtype(monkeypatch)
    for logits, expected in compared(CONFIG, torch.float64):
        # Some thousand float64 roundings.
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "changed",
    [
        {"sliding_window": 6},
        {"sliding_window": None},
        {"attn_logit_softcapping": None},
        {"query_pre_attn_scalar": None},
    ],
    ids=str,
)
def test_every_setting_matters_where_there_are_images(changed):
    other = replace(CONFIG, language=replace(CONFIG.language, **changed))
    batch = make_batch(TEXTS, IMAGES, budgets=BUDGETS)
    tokens = torch.arange(*batch.layout.text_tokens(2))
    with torch.no_grad():
        plain, altered = (
            tiny_model(config).forward_logits(batch, tokens) for config in (CONFIG, other)
        )
    assert (plain - altered).abs().max() > 1e-4


def test_the_oracle_is_given_scaled_tokens():
    """As the comparison above assumes of the transformers that is installed."""
    theirs = hugging_face(CONFIG.language)
    embedding = theirs.get_input_embeddings()
    ids = torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        assert torch.equal(
            theirs(input_ids=ids).logits, theirs(inputs_embeds=embedding(ids)).logits
        )
        ratio = embedding(ids) / embedding.weight[ids]
    torch.testing.assert_close(ratio, torch.full_like(ratio, CONFIG.language.hidden_size**0.5))
