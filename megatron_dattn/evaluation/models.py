"""Whom the questions are put to: a checkpoint of a run, or an export.

Each says who it is without loading its weights, so that answers of another model are refused at
once, and answers that are all there need no model. Code that an export brings is run.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_dattn.checkpoint import FoundCheckpoint
from megatron_dattn.checkpoint.files import size_and_sha256
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.errors import CheckpointError, ConfigError
from megatron_dattn.evaluation.questions import Question
from megatron_dattn.inference import LoadedModel, Prompt, generate
from megatron_dattn.inference.load import find_run, load_found, run_and_step
from megatron_dattn.runtime.distributed import get_device, join_world
from megatron_dattn.runtime.os_errors import named
from megatron_dattn.runtime.rank_errors import run_on_all_ranks

_SUM = 16  # hexadecimal digits of an identity
_FILES_OF_EXPORT = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.py")


class Answers(Protocol):
    """A model that is ready."""

    def __call__(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """The answers to a batch of questions, in their order."""


class Candidate(Protocol):
    """A model before it is loaded."""

    @property
    def identity(self) -> str:
        """Name, and a sum of its weights: equal for the same model alone."""

    @property
    def template(self) -> str:
        """Conversation template, by name."""

    def load(self) -> Answers:
        """Load it on every rank. Collective."""


def find_model(folder: Path, template: str | None = None) -> Candidate:
    """The model of a run folder, of one of its checkpoints, or of an export; on one rank.

    Args:
        template: conversation template of a run; its own one where None. An export has one alone.

    Raises:
        CheckpointError: there is no model in the folder, or a damaged one.
        ConfigError: a template is given for an export.
    """
    run, step = run_and_step(folder)
    if (run / "config.yaml").is_file() or not (folder / "config.json").is_file():
        return RunModel(run, *find_run(run, step), template)
    if template is not None:
        raise ConfigError(f"{folder} is an export, which has its own template; leave it out")
    return ExportedModel(folder)


class RunModel:
    """A checkpoint of a run."""

    def __init__(
        self, folder: Path, found: FoundCheckpoint, config: PretrainConfig, template: str | None
    ) -> None:
        self.template = template or config.data.template
        self._folder, self._found, self._config = folder, found, config

    @property
    def identity(self) -> str:
        """Run and step, and a sum of the sums in the manifest."""
        files = {name: file.sha256 for name, file in self._found.manifest.files.items()}
        return f"{self._folder.resolve().name}/{self._found.path.name}@{_sum(files)}"

    def load(self) -> Answers:
        """Load it; where there are several ranks, each has the whole model. Collective."""
        loaded = load_found(self._folder, self._found, self._config, template=self.template)
        return lambda questions, most: answers_of(loaded, questions, most)


def answers_of(loaded: LoadedModel, questions: Sequence[Question], most: int) -> list[str]:
    """The engine's greedy answers, all in one pack; each distinct image is encoded once.

    Args:
        most: new tokens of an answer.
    """
    prompts = [Prompt.from_question(loaded, q.text, q.paths) for q in questions]
    return generate(loaded, prompts, max_new_tokens=most)


class ExportedModel:
    """A Hugging Face folder, as transformers loads it and answers with it."""

    template = "the export's"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        paths = sorted(path for pattern in _FILES_OF_EXPORT for path in folder.glob(pattern))
        if not any(path.suffix == ".safetensors" for path in paths):
            raise CheckpointError(f"{folder} has a config.json but no safetensors: is it a model?")
        with named(folder):
            sums = {path.name: size_and_sha256(path)[1] for path in paths}
        self.identity = f"{folder.resolve().name}@{_sum(sums)}"

    def load(self) -> Answers:
        """Load it on every rank's device, in the dtype that it is stored in."""
        join_world()
        return run_on_all_ranks(self._load)

    def _load(self) -> Answers:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        where: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
        try:
            processor = AutoProcessor.from_pretrained(self._folder, **where)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                self._folder, dtype="auto", use_safetensors=True, **where
            )
        except Exception as error:  # a damaged file, or the folder's own code, can raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"transformers cannot load {self._folder}: {reason}") from error
        model = model.to(get_device()).eval()
        return lambda questions, most: _exported_answers(model, processor, questions, most)


@torch.inference_mode()
def _exported_answers(
    model: Any, processor: Any, questions: Sequence[Question], most: int
) -> list[str]:
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": _content(question)}] for question in questions],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device, model.dtype)
    tokens = model.generate(**inputs, max_new_tokens=most, do_sample=False, num_beams=1)
    texts = processor.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [str(text).strip() for text in texts]


def _content(question: Question) -> list[dict[str, str]]:
    images = [{"type": "image", "path": path} for path in question.paths]
    return [*images, {"type": "text", "text": question.text}]


def _sum(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:_SUM]
