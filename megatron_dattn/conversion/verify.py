"""Compares a checkpoint's outputs with those of the Hugging Face models that it came from.

Language model: logits of every row of a text. Vision encoder: the features that feed the adapter.
Whole vision-language models: see `verify_whole.py`.
One model is in memory at a time. Text without images passes every attention preset alike, so a
converted checkpoint must agree whatever preset its configuration names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dattn.attention import TokenLayout
from megatron_dattn.checkpoint import find_checkpoint
from megatron_dattn.checkpoint.tensors import StoredTensor, open_tensors
from megatron_dattn.data.sample import PackedBatch
from megatron_dattn.errors import CheckpointError
from megatron_dattn.models.build import build_model
from megatron_dattn.models.config import (
    AdapterConfig,
    ExecutionConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
)
from megatron_dattn.models.vlm import DAttnVLM
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.runtime.distributed import get_device, one_process

NUM_TOKENS = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Comparison:
    """How far one output of ours is from Hugging Face's."""

    what: str
    largest: float
    """Largest difference of two values, over the largest magnitude of Hugging Face's."""
    num_values: int


def verify_checkpoint(
    run_folder: Path,
    *,
    vision: Path | None = None,
    language: Path | None = None,
    whole: Path | None = None,
    tokens: Sequence[int] | None = None,
    dtype: str = "fp32",
) -> list[Comparison]:
    """Run both sides on the same inputs.

    Args:
        run_folder: with a checkpoint that was converted, or trained with frozen encoder and
            language model; one checkpoint's folder will do.
        vision: the SigLIP folder; the one that the conversion came from where None. Without either
            the vision encoder is not compared.
        language: the Mistral folder, likewise; it is always compared.
        whole: the folder of a whole vision-language model, likewise, instead of the two.
        tokens: ids of one text; random ones where None.
        dtype: "fp32" or "bf16", in which both sides are computed.

    Raises:
        CheckpointError: a folder is missing or does not fit, or a token is not in the vocabulary.
    """
    found = find_checkpoint(run_folder)
    if found is None:
        raise CheckpointError(f"{run_folder} holds no checkpoint")
    facts = found.manifest.facts
    config, sources = model_config(facts), facts.get("sources", {})
    whole = whole or _folder(sources.get("model"))
    if whole is not None:
        from megatron_dattn.conversion.verify_whole import verify_whole_model  # builds on this file

        tensors = open_tensors(found.path)
        return verify_whole_model(tensors, config, whole, tokens=tokens, dtype=dtype)
    vision = vision or _folder(sources.get("vision_model"))
    language = language or _folder(sources.get("language_model"))
    if language is None:
        raise CheckpointError(f"{found.path} does not say what it came from: give --language")
    ids = token_ids(tokens, config.language.vocab_size)
    pixels = random_pixels(config.vision.image_size).to(DTYPES[dtype])
    expected = {"logits of the language model": hugging_face_logits(language, ids, dtype)}
    if vision is not None:
        features = hugging_face_features(vision, pixels, config)
        expected["features of the vision encoder"] = features
    ours = _our_outputs(open_tensors(found.path), config, ids, pixels, dtype)
    return [compare(what, ours[what], theirs) for what, theirs in expected.items()]


def model_config(facts: Mapping[str, Any]) -> ModelConfig:
    """The model that a checkpoint's manifest describes.

    Raises:
        CheckpointError: another version's checkpoint, with fields that this one does not know.
    """
    try:
        model = facts["model"]
        return ModelConfig(
            vision=VisionConfig(**model["vision"]),
            adapter=AdapterConfig(**model["adapter"]),
            language=LanguageConfig(**model["language"]),
            attention=model["attention"],
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint's model cannot be understood: {error}") from error


def compare(what: str, ours: Tensor, theirs: Tensor) -> Comparison:
    """Largest difference relative to the largest value; not finite where a value is not."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    difference = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    return Comparison(what, float(difference), theirs.numel())


def _folder(source: str | None) -> Path | None:
    return None if source is None else Path(source)


def token_ids(tokens: Sequence[int] | None, vocab_size: int) -> Tensor:
    if tokens is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (NUM_TOKENS,), generator=generator)
    wrong = [token for token in tokens if not 0 <= token < vocab_size]
    if wrong or not tokens:
        raise CheckpointError(
            f"--tokens {wrong or 'without any'}: ids go from 0 to {vocab_size - 1}"
        )
    return torch.tensor(tokens)


def random_pixels(side: int) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.inference_mode()
def hugging_face_logits(folder: Path, ids: Tensor, dtype: str) -> Tensor:
    """Logits [rows, vocabulary] of one text by `AutoModelForCausalLM`, on the CPU."""
    from transformers import AutoModelForCausalLM

    model = load_pretrained(AutoModelForCausalLM, folder, DTYPES[dtype])
    return model(ids[None].to(get_device())).logits[0].cpu()


@torch.inference_mode()
def hugging_face_features(folder: Path, pixels: Tensor, config: ModelConfig) -> Tensor:
    """Features [images, patches, width] of the layer that feeds the adapter, on the CPU."""
    from transformers import AutoModel

    model = load_pretrained(AutoModel, folder, pixels.dtype)
    encoder = getattr(model, "vision_model", model)
    states = encoder(pixels.to(get_device()), output_hidden_states=True).hidden_states
    # A class token, where there is one, comes first and is not for the adapter.
    return states[config.vision.feature_layer][:, -config.vision.num_patches :].cpu()


def load_pretrained(
    kind: Any, folder: Path, dtype: torch.dtype, *, trust_code: bool = False
) -> nn.Module:
    """A model as transformers loads it from a folder, on the device.

    Args:
        kind: one of transformers' auto classes.
        trust_code: run the code that the folder brings.

    Raises:
        CheckpointError: transformers refuses the folder.
    """
    try:
        model = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=trust_code,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder} cannot be loaded by transformers: {reason}") from error
    return model.eval().to(get_device())


@torch.inference_mode()
def _our_outputs(
    tensors: dict[str, StoredTensor], config: ModelConfig, ids: Tensor, pixels: Tensor, dtype: str
) -> dict[str, Tensor]:
    execution = ExecutionConfig(
        precision="fp32" if dtype == "fp32" else "bf16", transformer_impl="local"
    )
    with one_process():
        model = build_model(config, ParallelConfig(), execution).eval()
        fill_parameters(model, tensors)
        batch = text_batch(ids, pixels).to(get_device())
        rows = torch.arange(len(ids), device=get_device())
        assert model.vision_model is not None
        return {
            "logits of the language model": model.forward_logits(batch, rows).cpu(),
            "features of the vision encoder": model.vision_model(pixels.to(get_device())).cpu(),
        }


def fill_parameters(model: DAttnVLM, tensors: dict[str, StoredTensor]) -> None:
    """Give parameters their stored values; a conversion lacks those that text never meets."""
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.copy_(tensors[name].load())


def text_batch(ids: Tensor, pixels: Tensor) -> PackedBatch:
    return PackedBatch(
        layout=TokenLayout((len(ids),), (), 0, len(ids), (len(ids),)),
        input_ids=ids,
        labels=torch.full_like(ids, -100),
        pixel_values=pixels[:0],
        sample_keys=["0"],
    )
