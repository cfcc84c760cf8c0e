"""Tiny LLaVA-1.5 folders with random weights, written the way the published ones are."""

import json
from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from tests.unit.conversion.hf_models import (
    IMAGE_SIZE,
    LANGUAGE_SIZES,
    PATCH_SIZE,
    SPECIAL_TOKENS,
    VISION_SIZES,
    save_tokenizer,
)

IMAGE_ID = len(SPECIAL_TOKENS) - 1
LLAVA_VISION = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
LLAVA_LANGUAGE = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}


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
