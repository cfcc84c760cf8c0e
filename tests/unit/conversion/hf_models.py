"""Tiny Hugging Face checkpoints with random weights, written the way the real ones are."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[control_8]"]
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
