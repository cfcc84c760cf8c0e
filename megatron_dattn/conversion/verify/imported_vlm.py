"""Compares an imported vision-language model with the one it came from, images included.

LLaVA runs as transformers has it, an export of ours as megatron_dattn/hf has it, which is the code
that the export carries. One model is in memory at a time. Where a preset other than LLaVA's own
starts from its weights, logits behind an image must differ; the tokens that the adapter makes of
the image are compared then.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dattn.checkpoint.tensors import StoredTensor
from megatron_dattn.conversion.families import dattn, llava
from megatron_dattn.conversion.hf_import.vlm_source import image_token_id
from megatron_dattn.conversion.io.hf_folder import read_model_config
from megatron_dattn.conversion.verify.float64 import arithmetic
from megatron_dattn.conversion.verify.parity import (
    DTYPES,
    check_same_model,
    load_pretrained,
    one_text,
    our_model,
    random_pixels,
    rounding,
    text_logits,
    token_ids,
)
from megatron_dattn.conversion.verify.verdict import (
    DEFAULT_TOLERANCE,
    Comparison,
    Pair,
    judge,
)
from megatron_dattn.errors import CheckpointError
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.runtime.distributed import get_device
from megatron_dattn.runtime.progress import ByteProgress, unseen

logger = logging.getLogger(__name__)

TEXT = "logits of a text"
SEEN = "logits of a text with an image"
TOKENS = "tokens of an image"


def verify_whole_model(
    tensors: dict[str, StoredTensor],
    config: ModelConfig,
    folder: Path,
    *,
    tokens: Sequence[int] | None,
    dtype: str,
    tolerance: float = DEFAULT_TOLERANCE,
    progress: ByteProgress = unseen,
) -> list[Comparison]:
    """Run both sides on the same inputs.

    Args:
        tensors: of the checkpoint.
        config: of its model.
        folder: the Hugging Face model's.
        tokens, dtype, tolerance, progress: as for `verify_checkpoint`.

    Raises:
        CheckpointError: the folder does not fit, or a token is `<image>` or not in the vocabulary.
    """
    original = read_model_config(folder)
    kind = original.get("model_type")
    if kind not in (llava.MODEL_TYPE, dattn.MODEL_TYPE):
        raise CheckpointError(
            f"{folder} holds a model of type '{kind}', to which no import with --model can be "
            "compared"
        )
    check_same_whole_model(folder, original, config)
    image_id = image_token_id(original)
    ids = _text_ids(tokens, config.language.vocab_size, image_id)

    def run(dtype: str) -> list[Pair]:
        return _both_sides(tensors, config, folder, ids, image_id, dtype, progress)

    return judge(run, dtype, tolerance, rounding(tensors, dtype))


def _both_sides(
    tensors: dict[str, StoredTensor],
    config: ModelConfig,
    folder: Path,
    ids: Tensor,
    image_id: int,
    dtype: str,
    progress: ByteProgress,
) -> list[Pair]:
    pixels = random_pixels(config.vision.image_size)[:1].to(DTYPES[dtype])
    rounded = rounding(tensors, dtype)
    logger.info("1 of 2: outputs of %s", folder)
    with arithmetic(dtype):
        if read_model_config(folder)["model_type"] == llava.MODEL_TYPE:
            expected = _llava_outputs(folder, config, ids, pixels, image_id, rounded)
            preset = config.preset
            expected.pop(TOKENS if preset.attends_in_reading_order else SEEN)
        else:
            expected = _dattn_outputs(folder, ids, pixels, image_id, rounded)
    logger.info("2 of 2: the checkpoint's")
    ours = _our_outputs(tensors, config, ids, pixels, dtype, progress)
    return [Pair(what, ours[what], theirs) for what, theirs in expected.items()]


def check_same_whole_model(folder: Path, original: dict[str, Any], config: ModelConfig) -> None:
    """Raise CheckpointError unless a LLaVA or an export of ours has the checkpoint's sizes.

    Args:
        original: the folder's config.json.
    """
    if original["model_type"] == llava.MODEL_TYPE:
        check_same_model(folder, llava.model_from_config(original), config, holds_preset=False)
    else:
        check_same_model(folder, dattn.model_from_config(original), config)


def _text_ids(tokens: Sequence[int] | None, vocab_size: int, image_id: int) -> Tensor:
    ids = token_ids(tokens, vocab_size)
    if tokens is None:
        return torch.where(ids == image_id, 0, ids)
    if image_id in tokens:
        raise CheckpointError(
            f"--tokens {image_id} is <image>, which is no text; an image is added anyway"
        )
    return ids


@torch.inference_mode()
def _llava_outputs(
    folder: Path,
    config: ModelConfig,
    ids: Tensor,
    pixels: Tensor,
    image_id: int,
    rounded_to: torch.dtype | None,
) -> dict[str, Tensor]:
    """LLaVA's text holds as many `<image>` as an image has tokens."""
    from transformers import LlavaForConditionalGeneration

    model: Any = load_pretrained(
        LlavaForConditionalGeneration, folder, pixels.dtype, rounded_to=rounded_to
    )
    outputs = _logits(model, ids, pixels, image_id, config.vision.num_patches)
    # Without rows that an export of ours added for `<image>`.
    outputs = {name: each[:, : config.language.vocab_size] for name, each in outputs.items()}
    tower = model.model.vision_tower(pixels.to(get_device()), output_hidden_states=True)
    layer = model.config.vision_feature_layer
    # A class token, where there is one, comes first and is not for the adapter.
    features = tower.hidden_states[layer][:, -config.vision.num_patches :]
    return {**outputs, TOKENS: model.model.multi_modal_projector(features)[0].cpu()}


@torch.inference_mode()
def _dattn_outputs(
    folder: Path, ids: Tensor, pixels: Tensor, image_id: int, rounded_to: torch.dtype | None
) -> dict[str, Tensor]:
    """Our exported code's text holds one `<image>` for each image."""
    from megatron_dattn.hf.modeling_dattn import DAttnForConditionalGeneration

    model = load_pretrained(
        DAttnForConditionalGeneration, folder, pixels.dtype, rounded_to=rounded_to
    )
    return _logits(model, ids, pixels, image_id, 1)


def _logits(
    model: nn.Module, ids: Tensor, pixels: Tensor, image_id: int, tokens_per_image: int
) -> dict[str, Tensor]:
    """Of a text, and of the text with an image behind its first token, [tokens, vocabulary]."""
    device = get_device()
    image = torch.full((tokens_per_image,), image_id)
    seen = torch.cat([ids[:1], image, ids[1:]])
    alone = model(input_ids=ids[None].to(device)).logits[0]
    together = model(input_ids=seen[None].to(device), pixel_values=pixels.to(device)).logits[0]
    return {TEXT: alone.cpu(), SEEN: together.cpu()[seen != image_id]}


@torch.inference_mode()
def _our_outputs(
    tensors: dict[str, StoredTensor],
    config: ModelConfig,
    ids: Tensor,
    pixels: Tensor,
    dtype: str,
    progress: ByteProgress,
) -> dict[str, Tensor]:
    with our_model(config, tensors, dtype, progress) as model, arithmetic(dtype):
        outputs = {
            TEXT: text_logits(model, one_text(config, ids, pixels)),
            SEEN: text_logits(model, one_text(config, ids, pixels, image_offsets=(1,))),
        }
        if model.adapter is not None:
            assert model.vision_model is not None
            features = model.vision_model(pixels.to(get_device()))
            outputs[TOKENS] = model.adapter.project(features)[0].cpu()
        return outputs
