"""A converted LLaVA-1.5 checkpoint equals Hugging Face's model, with either encoder and decoder."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    SiglipVisionConfig,
)

from megatron_dattn.conversion.families import llava as conversion
from megatron_dattn.conversion.families.key_names import key_names
from megatron_dattn.conversion.families.weight_map import check_tensors
from megatron_dattn.conversion.io.hf_folder import read_json
from megatron_dattn.conversion.io.safetensors_reader import SafetensorsFolder
from megatron_dattn.models.vlm import DAttnVLM
from tests.support.vlm import LANGUAGE, VISION, make_batch, tiny_model

pytestmark = pytest.mark.usefixtures("one_process")

IMAGE_TOKEN = LANGUAGE.vocab_size - 1
BUDGETS = (36, 24)
_VISION_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("image_size", "patch_size"),
)
_LANGUAGE_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "vocab_size", "rms_norm_eps"),
)
_VISION_CONFIGS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
_LANGUAGE_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig}


@cache
def _llava(vision: str, language: str, feature_layer: int = -2) -> LlavaForConditionalGeneration:
    more = {"sliding_window": None} if language == "mistral" else {}
    torch.manual_seed(13)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=_VISION_CONFIGS[vision](
                **{n: getattr(VISION, n) for n in _VISION_FIELDS}
            ),
            text_config=_LANGUAGE_CONFIGS[language](
                **{name: getattr(LANGUAGE, name) for name in _LANGUAGE_FIELDS},
                rope_parameters={"rope_type": "default", "rope_theta": LANGUAGE.rope_theta},
                initializer_range=0.2,
                **more,
            ),
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=feature_layer,
            vision_feature_select_strategy="default" if vision == "clip" else "full",
        )
    ).eval()
    with torch.no_grad():  # initial biases are zero and norms one: let them matter
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.05)
    return model


def _converted(folder: Path) -> DAttnVLM:
    """Our model with a folder's weights, as an importer would fill it."""
    config = conversion.model_from_config(read_json(folder / "config.json"))
    weights = SafetensorsFolder(folder)
    keys = key_names(weights.shapes)
    model = tiny_model(config)
    by_module = conversion.weight_rules(config, keys)
    every_rule = [rule for rules in by_module.values() for rule in rules]
    unused = conversion.unused_prefixes(config, keys)
    check_tensors(every_rule, weights.shapes, unused=unused, origin=str(folder))
    for module, rules in by_module.items():
        ours = dict(model.get_submodule(module).named_parameters())
        for rule in rules:
            parts = [weights.load(name) for name in rule.sources]
            joined = rule.layout.join(parts)
            with torch.no_grad():
                ours.pop(rule.megatron).copy_(joined)
            again = rule.layout.split(joined)
            assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True)), rule.megatron
        assert not ours
    return model


@pytest.mark.parametrize(
    "images",
    [
        [()],  # text alone
        [(0,)],  # first thing in the sample
        [(4,)],
        [(9,)],  # last thing
        [(2, 2, 7)],  # two neighbours and a third
        [(3,), (), (1, 5)],  # ragged pack with a text-only sample
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("vision", "language"), [("clip", "llama"), ("siglip", "llama"), ("siglip", "mistral")]
)
def test_s_attn_equals_llava(vision, language, images, tmp_path):
    llava = _llava(vision, language)
    llava.save_pretrained(tmp_path)
    _assert_equal_logits(_converted(tmp_path), llava, images)


@pytest.mark.parametrize("original_names", [False, True])
@pytest.mark.parametrize("feature_layer", [-1, -3, 2])
def test_both_sets_of_names_and_every_feature_layer(feature_layer, original_names, tmp_path):
    llava = _llava("clip", "llama", feature_layer)
    llava.save_pretrained(tmp_path, save_original_format=original_names)
    names = SafetensorsFolder(tmp_path).shapes
    assert ("language_model.lm_head.weight" in names) == original_names
    _assert_equal_logits(_converted(tmp_path), llava, [(4,)])


def _assert_equal_logits(
    model: DAttnVLM, llava: LlavaForConditionalGeneration, images: list[tuple[int, ...]]
) -> None:
    batch = make_batch([9, 5, 8][: len(images)], images, budgets=BUDGETS)
    batch.input_ids.clamp_(max=IMAGE_TOKEN - 1)
    first_image = 0
    for sample, offsets in enumerate(images):
        start, end = batch.layout.text_tokens(sample)
        with torch.no_grad():
            logits = model.forward_logits(batch, torch.arange(start, end))
            expected = _llava_text_logits(
                llava,
                batch.input_ids[start - BUDGETS[0] : end - BUDGETS[0]].tolist(),
                offsets,
                batch.pixel_values[first_image : first_image + len(offsets)],
            )
        first_image += len(offsets)
        # fp32 sums in another order, through encoder, adapter and decoder.
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)


def _llava_text_logits(
    llava: LlavaForConditionalGeneration,
    text: list[int],
    offsets: tuple[int, ...],
    pixels: Tensor,
) -> Tensor:
    ids: list[int] = []
    for place in range(len(text) + 1):
        ids += [IMAGE_TOKEN] * VISION.num_patches * offsets.count(place)
        ids += text[place : place + 1]
    ids_tensor = torch.tensor([ids])
    images = {"pixel_values": pixels} if len(pixels) else {}
    return llava(input_ids=ids_tensor, **images).logits[0][ids_tensor[0] != IMAGE_TOKEN]
