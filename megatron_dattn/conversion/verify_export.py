"""Compares a run's checkpoint with the Hugging Face folder that was exported from it.

Both compute the logits of the same texts and images, one side after the other in memory: the export
as transformers loads it, with its own code where it brings some, the checkpoint through the
training code. Inputs are a question about image files, or random tokens and pixels.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_dattn.checkpoint.tensors import StoredTensor, open_tensors
from megatron_dattn.conversion.compared_model import (
    DTYPES,
    Comparison,
    compare,
    load_pretrained,
    one_text,
    our_model,
    text_logits,
)
from megatron_dattn.conversion.exportable import check_exportable, is_llava
from megatron_dattn.conversion.foreign_folders import read_model_config
from megatron_dattn.conversion.verify_whole import check_same_whole_model
from megatron_dattn.data.conversation import IMAGE_TOKEN
from megatron_dattn.data.tokenizer import token_id
from megatron_dattn.errors import CheckpointError
from megatron_dattn.inference.load import RunAssets, find_run, load_assets, run_and_step
from megatron_dattn.inference.prompt import Prompt
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.runtime.distributed import get_device
from megatron_dattn.runtime.progress import Progress, unseen

logger = logging.getLogger(__name__)

_RANDOM_TOKENS = 48
_RANDOM_IMAGES = ((), (0,), (3, 20, 20))
"""In front of which tokens the images of each random text stand: none, one, several."""


@dataclass(frozen=True)
class Question:
    """One text and its images, as both sides get them."""

    what: str
    input_ids: Tensor
    """[text rows], without `<image>`."""
    image_offsets: tuple[int, ...]
    """How many text rows stand in front of each image."""
    pixels: Tensor
    """[images, 3, side, side]."""


def verify_export(
    run_folder: Path,
    exported: Path,
    *,
    question: str | None = None,
    images: Sequence[Path] = (),
    dtype: str = "fp32",
    progress: Progress = unseen,
) -> list[Comparison]:
    """Run both sides on the same inputs.

    Args:
        run_folder: the run, whose newest sound checkpoint is compared, or `run/step-0000400`.
        exported: the Hugging Face folder. Code that it brings is run.
        question: a user's message; random texts with no, one and several images where None.
        images: files that stand in front of the question.
        dtype: "fp32" or "bf16", in which both sides are computed.
        progress: of reading the checkpoint, to compare it with its manifest and to compute with it.

    Raises:
        CheckpointError: a folder is missing or does not fit the other.
        ConfigError: the model cannot be exported, or its tokenizer does not fit.
        DataError: the question or an image cannot be used.
    """
    run_folder, step = run_and_step(run_folder)
    found, config = find_run(run_folder, step, progress)
    check_exportable(config.model)
    _check_fits(exported, config.model)
    assets = load_assets(run_folder, config)
    asked = _random_questions(assets) if question is None else [_ask(assets, question, images)]
    logger.info("1 of 2: logits of %s", exported)
    theirs = _their_logits(exported, asked, assets, DTYPES[dtype])
    logger.info("2 of 2: logits of %s", found.path)
    ours = _our_logits(open_tensors(found.path), asked, config.model, dtype, progress)
    return [
        compare(each.what, mine, other)
        for each, mine, other in zip(asked, ours, theirs, strict=True)
    ]


def _check_fits(exported: Path, model: ModelConfig) -> None:
    """What would be an error deep inside of transformers, or meaningless."""
    content = read_model_config(exported)
    expected = "llava" if is_llava(model) else "dattn"
    if content.get("model_type") != expected:
        raise CheckpointError(
            f"{exported} holds a model of type {json.dumps(content.get('model_type'))}, the run's "
            f"export is of type {json.dumps(expected)}: is it the export of this run?"
        )
    check_same_whole_model(exported, content, model)


def _ask(assets: RunAssets, question: str, images: Sequence[Path]) -> Question:
    prompt = Prompt.from_question(assets, question, images)
    return Question(
        f"logits of the question with {_count(len(images))}",
        torch.tensor(prompt.rows.input_ids),
        tuple(prompt.rows.image_offsets),
        assets.preprocessor.normalise(prompt.pixels),
    )


def _random_questions(assets: RunAssets) -> list[Question]:
    generator = torch.Generator().manual_seed(0)
    model, side = assets.config.model, assets.config.model.vision.image_size
    questions = []
    for offsets in _RANDOM_IMAGES:
        # Not the whole vocabulary: `<image>` is no text.
        ids = torch.randint(model.language.vocab_size - 1, (_RANDOM_TOKENS,), generator=generator)
        ids += ids >= token_id(assets.tokenizer, IMAGE_TOKEN)
        pixels = torch.rand(len(offsets), 3, side, side, generator=generator) * 2 - 1
        what = f"logits of a random text with {_count(len(offsets))}"
        questions.append(Question(what, ids, offsets, pixels))
    return questions


def _count(images: int) -> str:
    return {0: "no image", 1: "one image"}.get(images, f"{images} images")


@torch.inference_mode()
def _their_logits(
    exported: Path, questions: Sequence[Question], assets: RunAssets, dtype: torch.dtype
) -> list[Tensor]:
    """Logits [text rows, vocabulary] of every question by transformers, on the CPU."""
    from transformers import AutoModelForImageTextToText

    llava = is_llava(assets.config.model)
    model = load_pretrained(AutoModelForImageTextToText, exported, dtype, trust_code=not llava)
    image = token_id(assets.tokenizer, IMAGE_TOKEN)
    # LLaVA's text has a place for every visual row, ours one for the image.
    places = assets.config.model.vision.num_patches if llava else 1
    logits = []
    for question in questions:
        ids = _with_places(question, image, places).to(get_device())
        pixels = question.pixels.to(get_device(), dtype) if question.image_offsets else None
        result = model(input_ids=ids[None], pixel_values=pixels).logits[0]
        logits.append(result[ids != image].float().cpu())
    return logits


def _with_places(question: Question, image: int, count: int) -> Tensor:
    pieces, before = [], 0
    for offset in question.image_offsets:
        pieces += [question.input_ids[before:offset], torch.full((count,), image)]
        before = offset
    return torch.cat([*pieces, question.input_ids[before:]])


@torch.inference_mode()
def _our_logits(
    tensors: dict[str, StoredTensor],
    questions: Sequence[Question],
    config: ModelConfig,
    dtype: str,
    progress: Progress,
) -> list[Tensor]:
    """Logits [text rows, vocabulary] of every question by the training code, on the CPU."""
    with our_model(config, tensors, dtype, progress) as model:
        absent = {name for name, _ in model.named_parameters()} - tensors.keys()
        if absent:
            raise CheckpointError(f"the checkpoint lacks {', '.join(sorted(absent))}")
        logits = []
        for question in questions:
            pixels = question.pixels.to(DTYPES[dtype])
            batch = one_text(config, question.input_ids, pixels, question.image_offsets)
            logits.append(text_logits(model, batch).float())
        return logits
