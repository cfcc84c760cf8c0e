"""Tiny Hugging Face checkpoints with random weights, written the way the real ones are."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
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
    "rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"},
}
# By family. Gemma-2's caps are so low that they matter; 7 is neither its head_dim nor a square.
LANGUAGE_MODELS = {
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
            "sliding_window": 5,
        },
    ),
}
VISION_MODELS = {
    "siglip": (SiglipVisionModel, SiglipVisionConfig, 0.5),
    "clip": (CLIPVisionModel, CLIPVisionConfig, 0.4),
}


@torch.no_grad()
def vary_norms(model: PreTrainedModel) -> None:
    """Norms start all alike, so that one in another's place would not be noticed."""
    for name, parameter in model.named_parameters():
        if "norm" in name or "layrnorm" in name:
            parameter += 0.2 * torch.randn_like(parameter)


@torch.no_grad()
def vary_biases(model: PreTrainedModel) -> None:
    """Biases of a decoder start at zero, so that one that is left out would not be noticed."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter += 0.2 * torch.randn_like(parameter)


def save_vision(
    folder: Path, dtype: torch.dtype = torch.float32, family: str = "siglip", varied: bool = False
) -> PreTrainedModel:
    """A vision encoder's folder with an image processor's config; `varied` as below."""
    torch.manual_seed(0)
    model_class, config_class, mean = VISION_MODELS[family]
    model = model_class(config_class(**VISION_SIZES))
    if varied:
        vary_norms(model)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "image_mean": [mean] * 3,
        "image_std": [0.5, 0.5, 0.5],
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def save_language(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    family: str = "mistral",
    varied: bool = False,
    max_shard_size: str = "5GB",
    **changes: object,
) -> PreTrainedModel:
    """A language model's folder with a fast tokenizer.

    Args:
        varied: no two norms are alike, weights so large that attention is far from uniform and
            scores reach the caps, and `[control_8]`, which becomes `<image>`, is never the
            likeliest token, as in trained models.
        max_shard_size: of the files that hold the weights.
        changes: of the config.
    """
    torch.manual_seed(1)
    model_class, config_class, of_family = LANGUAGE_MODELS[family]
    spread = {"initializer_range": 0.3} if varied else {}
    model = model_class(config_class(**{**LANGUAGE_SIZES, **of_family, **spread, **changes}))
    vary_biases(model)
    if varied:
        vary_norms(model)
        with torch.no_grad():
            model.get_output_embeddings().weight[SPECIAL_TOKENS.index("[control_8]")] = 0.0
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
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
