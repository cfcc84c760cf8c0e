"""Tiny Hugging Face checkpoints with random weights, written the way the real ones are."""

import json
import os
from math import prod
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megatron_dattn.conversion.weight_map import Rule

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[control_8]"]
IMAGE_ID = len(SPECIAL_TOKENS) - 1
IMAGE_SIZE, PATCH_SIZE = 28, 8  # 4 pixels beyond the last whole patch, as in 384 with patch 14
VISION_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
LANGUAGE_SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"},
}


def save_vision(folder: Path, dtype: torch.dtype = torch.float32) -> SiglipVisionModel:
    """A SigLIP folder with an image processor's config."""
    torch.manual_seed(0)
    model = SiglipVisionModel(SiglipVisionConfig(**VISION_SIZES)).to(dtype).eval()
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def save_language(
    folder: Path, dtype: torch.dtype = torch.float32, **changes: object
) -> MistralForCausalLM:
    """A Mistral folder with a fast tokenizer."""
    torch.manual_seed(1)
    model = MistralForCausalLM(MistralConfig(**{**LANGUAGE_SIZES, **changes})).to(dtype).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder, SPECIAL_TOKENS)
    return model


def save_tokenizer(folder: Path, special_tokens: list[str]) -> None:
    """A fast tokenizer of letters behind special tokens, of which the first three are Mistral's."""
    letters = "abcdefghijklmnopqrstuvwxyz ?.\n"
    vocab = {token: index for index, token in enumerate([*special_tokens, *letters, "\u2581"])}
    backend = Tokenizer(BPE(vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = Metaspace(prepend_scheme="never")
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special_tokens[3:],
    ).save_pretrained(folder)


LLAVA_VISION = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
LLAVA_LANGUAGE = {"llama": LlamaConfig, "mistral": MistralConfig}


def llava_model(
    vision: str, language: str, *, feature_layer: int = -2
) -> LlavaForConditionalGeneration:
    """A tiny LLaVA in which every parameter matters: no bias is zero, no norm one."""
    sizes = {name: size for name, size in LANGUAGE_SIZES.items() if name != "sliding_window"}
    more = {"sliding_window": None} if language == "mistral" else {}
    torch.manual_seed(2)
    config = LlavaConfig(
        vision_config=LLAVA_VISION[vision](**VISION_SIZES),
        text_config=LLAVA_LANGUAGE[language](**sizes, **more, initializer_range=0.2),
        image_token_index=IMAGE_ID,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default" if vision == "clip" else "full",
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def save_llava(
    folder: Path, vision: str = "clip", language: str = "llama", *, original_names: bool = False
) -> LlavaForConditionalGeneration:
    """A LLaVA-1.5 folder: weights, tokenizer with `<image>`, image processor of its encoder.

    Args:
        original_names: the names from before transformers 4.52, which the public checkpoints have.
    """
    model = llava_model(vision, language)
    model.save_pretrained(folder, save_original_format=original_names)
    names = [*SPECIAL_TOKENS[:3], *(SPECIAL_TOKENS[3:5] if language == "mistral" else "$%")]
    save_tokenizer(folder, [*names, "<image>"])
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    clip = {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": True,
        "crop_size": square,
        "size": {"shortest_edge": IMAGE_SIZE},
    }
    siglip = {"image_processor_type": "SiglipImageProcessor", "size": square}
    settings = clip if vision == "clip" else siglip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def write_empty(folder: Path, rules: list[Rule]) -> None:
    """Weights of any size that take no room: a header, and a hole for the values."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in ((n, s) for rule in rules for n, s in rule.sources.items()):
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
