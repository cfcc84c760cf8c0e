"""Compares a checkpoint's outputs with those of the Hugging Face models that it came from.

Language model: logits of every token of a text. Vision encoder: the features that feed the adapter.
Whole vision-language models: see `verify_whole.py`.
One model is in memory at a time. Text without images passes every attention preset alike, so a
converted checkpoint must agree whatever preset its configuration names.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dattn.attention.rotary_scaling import RotaryScaling
from megatron_dattn.checkpoint import FoundCheckpoint, find_checkpoint
from megatron_dattn.checkpoint.tensors import StoredTensor, open_tensors
from megatron_dattn.conversion.families.registry import language_family, vision_family
from megatron_dattn.conversion.hf_import.source import language_folder
from megatron_dattn.conversion.io.hf_folder import read_model_config
from megatron_dattn.conversion.verify.float64 import arithmetic
from megatron_dattn.conversion.verify.imported_vlm import verify_whole_model
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
from megatron_dattn.errors import CheckpointError, ConfigError
from megatron_dattn.models.config import AdapterConfig, LanguageConfig, ModelConfig, VisionConfig
from megatron_dattn.runtime.distributed import get_device
from megatron_dattn.runtime.progress import ByteProgress, unseen

logger = logging.getLogger(__name__)

LOGITS = "logits of the language model"
FEATURES = "features of the vision encoder"


def verify_checkpoint(
    run_folder: Path,
    *,
    vision: Path | None = None,
    language: Path | None = None,
    whole: Path | None = None,
    tokens: Sequence[int] | None = None,
    dtype: str = "fp32",
    tolerance: float = DEFAULT_TOLERANCE,
    progress: ByteProgress = unseen,
) -> list[Comparison]:
    """Run both sides on the same inputs.

    What the caller names goes before what the checkpoint remembers of its origin.

    Args:
        run_folder: with a checkpoint that was converted, or trained with frozen encoder and
            language model; one checkpoint's folder will do.
        vision: the encoder's folder; the one that the conversion came from where None. Without
            either the vision encoder is not compared.
        language: the language model's folder, likewise; it is always compared.
        whole: the folder of a whole vision-language model, likewise, instead of the two.
        tokens: ids of one text; random ones where None.
        dtype: "fp32" or "bf16", in which both sides are computed.
        tolerance: relative difference above which both are computed in float64, too.
        progress: of reading the checkpoint, to compare it with its manifest and to compute with it.

    Raises:
        CheckpointError: a folder is missing or holds another model, or a token is not in the
            vocabulary.
        ConfigError: a whole model and a part are both given.
    """
    if whole is not None and (vision is not None or language is not None):
        raise ConfigError("--model is a whole model: leave --vision and --language out, or it")
    found = find_checkpoint(run_folder, progress=progress)
    if found is None:
        raise CheckpointError(f"{run_folder} holds no checkpoint")
    originals = _originals(found, vision, language, whole)
    tensors, config = open_tensors(found.path), model_from_facts(found.manifest.facts)
    if isinstance(originals, Path):
        return verify_whole_model(
            tensors,
            config,
            originals,
            tokens=tokens,
            dtype=dtype,
            tolerance=tolerance,
            progress=progress,
        )
    vision, language = originals
    with language_folder(language) as folder:
        _check_parts(config, vision, folder)
        ids = token_ids(tokens, config.language.vocab_size)

        def run(dtype: str) -> list[Pair]:
            return _both_sides(tensors, config, vision, folder, ids, dtype, progress)

        return judge(run, dtype, tolerance, rounding(tensors, dtype))


def _originals(
    found: FoundCheckpoint, vision: Path | None, language: Path | None, whole: Path | None
) -> Path | tuple[Path | None, Path]:
    """The folder of a whole model, or those of the encoder, if any, and the language model."""
    sources = found.manifest.facts.get("sources", {})
    if vision is None and language is None:
        whole = whole or _folder(sources.get("model"))
    if whole is not None:
        if "adapter" not in found.manifest.modules:
            raise CheckpointError(
                f"{found.path} holds no adapter, so no whole model can be compared with it: give "
                "--vision and --language"
            )
        return whole
    language = language or _folder(sources.get("language_model"))
    if language is None:
        raise CheckpointError(
            f"{found.path} does not say which language model it came from: give --language"
        )
    return vision or _folder(sources.get("vision_model")), language


def _both_sides(
    tensors: dict[str, StoredTensor],
    config: ModelConfig,
    vision: Path | None,
    language: Path,
    ids: Tensor,
    dtype: str,
    progress: ByteProgress,
) -> list[Pair]:
    pixels = random_pixels(config.vision.image_size).to(DTYPES[dtype])
    rounded = rounding(tensors, dtype)
    steps = 2 if vision is None else 3
    with arithmetic(dtype):
        logger.info("1 of %d: logits of %s", steps, language)
        expected = {LOGITS: hugging_face_logits(language, ids, DTYPES[dtype], rounded)}
        if vision is not None:
            logger.info("2 of %d: features of %s", steps, vision)
            expected[FEATURES] = hugging_face_features(vision, pixels, config, rounded)
    logger.info("%d of %d: the checkpoint's", steps, steps)
    ours = _our_outputs(tensors, config, ids, pixels, dtype, progress)
    return [Pair(what, ours[what], theirs) for what, theirs in expected.items()]


def _check_parts(config: ModelConfig, vision: Path | None, language: Path) -> None:
    """Raise CheckpointError unless the folders hold models of the checkpoint's sizes."""
    text = read_model_config(language)
    part = replace(config, language=language_family(text).language_config(text))
    check_same_model(language, part, config)
    if vision is not None:
        images = read_model_config(vision)
        layer = config.vision.feature_layer
        encoder = vision_family(images).vision_config(images, layer)
        check_same_model(vision, replace(config, vision=encoder), config)


def model_from_facts(facts: Mapping[str, Any]) -> ModelConfig:
    """The model that a checkpoint's manifest describes.

    Raises:
        CheckpointError: another version's checkpoint, with fields that this one does not know.
    """
    try:
        model = facts["model"]
        scaling = model["language"].get("rope_scaling")  # checkpoints from before it lack it
        language = {
            **model["language"],
            "rope_scaling": None if scaling is None else RotaryScaling(**scaling),
        }
        return ModelConfig(
            vision=VisionConfig(**model["vision"]),
            adapter=AdapterConfig(**model["adapter"]),
            language=LanguageConfig(**language),
            attention=model["attention"],
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint's model cannot be understood: {error}") from error


def _folder(source: str | None) -> Path | None:
    return None if source is None else Path(source)


@torch.inference_mode()
def hugging_face_logits(
    folder: Path, ids: Tensor, dtype: torch.dtype, rounded_to: torch.dtype | None
) -> Tensor:
    """Logits [tokens, vocabulary] of one text, int64 [tokens], by `AutoModelForCausalLM`.

    They are of `dtype`, on the CPU.
    """
    from transformers import AutoModelForCausalLM

    model = load_pretrained(AutoModelForCausalLM, folder, dtype, rounded_to=rounded_to)
    return model(ids[None].to(get_device())).logits[0].cpu()


@torch.inference_mode()
def hugging_face_features(
    folder: Path, pixels: Tensor, config: ModelConfig, rounded_to: torch.dtype | None
) -> Tensor:
    """Features [images, patches, width] of the layer that feeds the adapter, on the CPU, in the
    dtype of `pixels` [images, 3, side, side]."""
    from transformers import AutoModel

    model = load_pretrained(AutoModel, folder, pixels.dtype, rounded_to=rounded_to)
    encoder = getattr(model, "vision_model", model)
    states = encoder(pixels.to(get_device()), output_hidden_states=True).hidden_states
    # A class token, where there is one, comes first and is not for the adapter.
    return states[config.vision.feature_layer][:, -config.vision.num_patches :].cpu()


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
        assert model.vision_model is not None
        return {
            LOGITS: text_logits(model, one_text(config, ids, pixels)),
            FEATURES: model.vision_model(pixels.to(get_device())).cpu(),
        }
