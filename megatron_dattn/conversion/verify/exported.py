"""Compares a run's checkpoint with the Hugging Face folder that was exported from it.

Both compute the logits of the same texts and images, and both answer prompts: the export as
transformers loads and generates with it, with its own code where it brings some, the checkpoint
through the training code and the engine's generator. One side is in memory at a time. Inputs are a
question about image files, or random tokens and pixels (`compared_prompts.py`).
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dattn.checkpoint.tensors import StoredTensor, open_tensors
from megatron_dattn.conversion.families.exportable import check_exportable, is_llava
from megatron_dattn.conversion.io.hf_folder import read_model_config
from megatron_dattn.conversion.verify.float64 import arithmetic
from megatron_dattn.conversion.verify.imported_vlm import check_same_whole_model
from megatron_dattn.conversion.verify.parity import (
    DTYPES,
    load_pretrained,
    one_text,
    our_model,
    text_logits,
)
from megatron_dattn.conversion.verify.prompts import (
    Asked,
    asked_question,
    random_prompts,
    random_texts,
)
from megatron_dattn.conversion.verify.verdict import (
    DEFAULT_TOLERANCE,
    Comparison,
    Pair,
    judge,
)
from megatron_dattn.data.conversation import IMAGE_TOKEN
from megatron_dattn.data.tokenizer import token_id
from megatron_dattn.errors import CheckpointError
from megatron_dattn.inference.decoding import Decoding
from megatron_dattn.inference.load import (
    LoadedModel,
    RunAssets,
    find_run,
    load_assets,
    run_and_step,
)
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.runtime.distributed import get_device
from megatron_dattn.runtime.progress import ByteProgress, unseen

logger = logging.getLogger(__name__)

_NEW_TOKENS = 8


@dataclass(frozen=True)
class _Inputs:
    """What both sides compute."""

    texts: list[Asked]
    """Whose logits are compared, of every text token."""
    prompts: list[Asked]
    """Which are answered."""


@dataclass(frozen=True)
class _Answer:
    """Tokens, and the logits that each was chosen from, [tokens, vocabulary], on the CPU."""

    tokens: tuple[int, ...]
    logits: Tensor


@dataclass(frozen=True)
class _Outputs:
    texts: list[Tensor]
    answers: list[_Answer]


def verify_export(
    run_folder: Path,
    exported: Path,
    *,
    question: str | None = None,
    images: Sequence[Path] = (),
    dtype: str = "fp32",
    tolerance: float = DEFAULT_TOLERANCE,
    progress: ByteProgress = unseen,
) -> list[Comparison]:
    """Run both sides on the same inputs.

    Args:
        run_folder: the run, whose newest sound checkpoint is compared, or `run/step-0000400`.
        exported: the Hugging Face folder. Code that it brings is run.
        question: a user's message; random texts and prompts where None.
        images: files that stand in front of the question.
        dtype: "fp32" or "bf16", in which both sides are computed.
        tolerance: relative difference above which both are computed in float64, too.
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
    if question is None:
        inputs = _Inputs(random_texts(assets), random_prompts(assets))
    else:
        asked = asked_question(assets, question, images)
        inputs = _Inputs([asked], [asked])
    tensors = open_tensors(found.path)

    def run(dtype: str) -> list[Pair]:
        logger.info("1 of 2: logits and answers of %s", exported)
        with arithmetic(dtype):
            theirs = _their_outputs(exported, inputs, assets, DTYPES[dtype])
        logger.info("2 of 2: logits and answers of %s", found.path)
        with _our_loaded(assets, tensors, dtype, progress) as loaded, arithmetic(dtype):
            ours = _our_outputs(loaded, inputs, theirs.answers, dtype)
        return _pairs(inputs, ours, theirs)

    return judge(run, dtype, tolerance)


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


def _pairs(inputs: _Inputs, ours: _Outputs, theirs: _Outputs) -> list[Pair]:
    texts = zip(inputs.texts, ours.texts, theirs.texts, strict=True)
    answers = zip(inputs.prompts, ours.answers, theirs.answers, strict=True)
    return [
        *(Pair(f"logits of {asked.what}", mine, other) for asked, mine, other in texts),
        *(
            Pair(f"answer to {asked.what}", mine.logits, other.logits, other.tokens)
            for asked, mine, other in answers
        ),
    ]


@torch.inference_mode()
def _their_outputs(
    exported: Path, inputs: _Inputs, assets: RunAssets, dtype: torch.dtype
) -> _Outputs:
    """By transformers: its logits of text tokens, and its own greedy answers."""
    from transformers import AutoModelForImageTextToText

    llava = is_llava(assets.config.model)
    model: Any = load_pretrained(AutoModelForImageTextToText, exported, dtype, trust_code=not llava)
    image = token_id(assets.tokenizer, IMAGE_TOKEN)
    # LLaVA's text has a place for every visual token, ours one for the image.
    places = assets.config.model.vision.num_patches if llava else 1

    def given(asked: Asked) -> dict[str, Tensor]:
        ids = asked.input_ids(image, places)[None].to(get_device())
        pixels = {"pixel_values": asked.pixels.to(get_device(), dtype)}
        seen = pixels if len(asked.pixels) else {}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **seen}

    rows = assets.config.model.language.vocab_size  # a LLaVA may have one more, for `<image>`
    texts = []
    for asked in inputs.texts:
        columns = given(asked)
        logits = model(**columns).logits[0, :, :rows]
        texts.append(logits[columns["input_ids"][0] != image].cpu())
    answers = (_their_answer(model, given(asked)) for asked in inputs.prompts)
    return _Outputs(texts, [_Answer(each.tokens, each.logits[:, :rows]) for each in answers])


def _their_answer(model: Any, columns: dict[str, Tensor]) -> _Answer:
    result = model.generate(
        **columns,
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = result.sequences[0, columns["input_ids"].shape[1] :].tolist()
    return _Answer(tuple(tokens), torch.cat(result.logits).cpu())


@contextmanager
def _our_loaded(
    assets: RunAssets, tensors: dict[str, StoredTensor], dtype: str, progress: ByteProgress
) -> Iterator[LoadedModel]:
    with our_model(assets.config.model, tensors, dtype, progress) as model:
        absent = {name for name, _ in model.named_parameters()} - tensors.keys()
        if absent:
            raise CheckpointError(f"the checkpoint lacks {', '.join(sorted(absent))}")
        parts = {part.name: getattr(assets, part.name) for part in fields(assets)}
        yield LoadedModel(**parts, model=model)


@torch.inference_mode()
def _our_outputs(
    loaded: LoadedModel, inputs: _Inputs, theirs: Sequence[_Answer], dtype: str
) -> _Outputs:
    """By the training code and the engine's generator, which is given their answers' tokens.

    So every step is compared, also behind a token that was chosen by a hair's breadth.
    """
    texts = []
    for asked in inputs.texts:
        tokens, pixels = asked.prompt.tokens, asked.pixels.to(DTYPES[dtype])
        ids = torch.tensor(tokens.input_ids)
        batch = one_text(loaded.config.model, ids, pixels, tokens.image_offsets)
        texts.append(text_logits(loaded.model, batch))
    decoding = Decoding(loaded, [asked.prompt for asked in inputs.prompts])
    steps = [[logits] for logits in decoding.prefill().cpu()]
    for step in range(1, max(len(answer.tokens) for answer in theirs)):
        running = [i for i, answer in enumerate(theirs) if len(answer.tokens) > step]
        said = [theirs[index].tokens[step - 1] for index in running]
        for index, logits in zip(running, decoding.decode_step(running, said).cpu(), strict=True):
            steps[index].append(logits)
    answers = [
        _Answer(answer.tokens, torch.stack(logits))
        for answer, logits in zip(theirs, steps, strict=True)
    ]
    return _Outputs(texts, answers)
