"""Loads the newest checkpoint of a run folder for generation, on one process.

The run folder is self-contained: `config.yaml` says what the model is, `tokenizer/` holds tokenizer
and image processor. A checkpoint of any parallel layout loads.
"""

import logging
import os
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from megatron_dattn.checkpoint import FoundCheckpoint, find_checkpoint, find_step, load_checkpoint
from megatron_dattn.checkpoint.files import step_of
from megatron_dattn.checkpoint.tensors import open_tensors
from megatron_dattn.config.cli import load_config
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.data.template import ConversationTokenizer
from megatron_dattn.data.tokenizer import generation_ends, load_tokenizer, token_id
from megatron_dattn.errors import CheckpointError, ConfigError
from megatron_dattn.models.added_parameters import comes_with_preset, holds_preset
from megatron_dattn.models.build import build_model
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.models.model_identity import require_same
from megatron_dattn.models.vlm import DAttnVLM
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.runtime.distributed import initialize_distributed, seed_everything
from megatron_dattn.runtime.progress import ByteProgress, unseen

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunAssets:
    """What turns questions into a model's inputs, and its outputs into answers."""

    tokenizer: PreTrainedTokenizerBase
    conversations: ConversationTokenizer
    preprocessor: ImagePreprocessor
    config: PretrainConfig
    origin_ends: frozenset[int] = field(default=frozenset(), kw_only=True)
    """Tokens that end the answers of the model whose tokenizer this is."""

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's, the origin's, the template's; for captions,
        all that end in a line break, which byte-level tokenizers merge with what stands before."""
        stops = {int(self.tokenizer.eos_token_id), *self.origin_ends}
        end = self.conversations.end_token
        if end is not None:
            stops.add(token_id(self.tokenizer, end))
        if self.conversations.template == "plain":
            ids = list(self.tokenizer.get_vocab().values())
            texts = self.tokenizer.backend_tokenizer.decode_batch([[index] for index in ids])
            stops |= {i for i, text in zip(ids, texts, strict=True) if text.endswith("\n")}
        return frozenset(stops)


@dataclass(frozen=True)
class LoadedModel(RunAssets):
    """A model ready to answer, with what turns questions into its inputs."""

    model: DAttnVLM


def load_model(run_folder: str | Path, *, template: str | None = None) -> LoadedModel:
    """Load the newest sound checkpoint of a run folder, or the one of `run/step-0000400`.

    The process group of one process is set up if there is none; `destroy_distributed` ends it.

    Args:
        template: conversation template; the one that the run was trained with where None.

    Raises:
        CheckpointError: there is no usable checkpoint, or it lacks a module.
        ConfigError: the folder's configuration or tokenizer does not fit.
    """
    folder, step = run_and_step(Path(run_folder))
    return load_found(folder, *find_run(folder, step), template=template)


def load_found(
    folder: Path, found: FoundCheckpoint, config: PretrainConfig, *, template: str | None = None
) -> LoadedModel:
    """`load_model` for a checkpoint that `find_run` has found in a run folder. Collective: where
    there are several ranks, each has the whole model."""
    assets = load_assets(folder, config, template=template)
    initialize_distributed()
    seed_everything(config.training.seed)
    execution = ExecutionConfig(precision=config.execution.precision, transformer_impl="local")
    model = build_model(config.model, ParallelConfig(), execution)
    plain = not holds_preset(found.manifest.facts)
    loaded = load_checkpoint(
        found.path,
        {"model": model.sharded_state_dict()},
        modules=found.manifest.modules,
        without=comes_with_preset if plain else None,
    )
    missing = model.load_state_dict(loaded["model"], strict=not plain).missing_keys
    logger.info("loaded %s", found.path)
    _warn_of_rounding(found, model)
    if missing:
        logger.warning(
            "%s holds no %s: the model answers with their initial values; train it first",
            found.path,
            ", ".join(missing),
        )
    parts = {part.name: getattr(assets, part.name) for part in fields(assets)}
    return LoadedModel(**parts, model=model.eval())


def load_assets(folder: Path, config: PretrainConfig, *, template: str | None = None) -> RunAssets:
    """Tokenizer and image processor of a run folder; arguments and errors as in `load_model`."""
    tokenizer_folder = str(folder / "tokenizer")
    template = template or config.data.template
    tokenizer = load_tokenizer(
        tokenizer_folder, template=template, vocab_size=config.model.language.vocab_size
    )
    preprocessor = ImagePreprocessor.from_folder(
        tokenizer_folder,
        image_size=config.model.vision.image_size,
        image_fit=config.data.image_fit,
        max_pixels=config.data.max_image_pixels,
        image_grid_pinpoints=config.data.image_grid_pinpoints,
        video_frames=config.data.video_frames,
    )
    return RunAssets(
        tokenizer,
        ConversationTokenizer(tokenizer, template),
        preprocessor,
        config,
        origin_ends=generation_ends(tokenizer_folder, tokenizer),
    )


def run_and_step(folder: Path, step: int | None = None) -> tuple[Path, int | None]:
    """The run and step of a user who names a run's folder, or one of its checkpoints as a folder.

    Args:
        folder: `run/` or `run/step-0000400`.
        step: if it is named apart from the folder.

    Returns:
        The run's folder, and the step; None is the newest.

    Raises:
        ConfigError: two steps are named.
    """
    # By the name that was given first: a link `step-0000500` to another step's folder is an error,
    # while `best` may lead anywhere.
    given = Path(os.path.abspath(folder))
    checkpoint = given if step_of(given.name) is not None else folder.resolve()
    named = step_of(checkpoint.name)
    if named is None:
        return folder, step
    if step not in (None, named):
        raise ConfigError(f"{folder} is the checkpoint of step {named}, not of {step}; name one")
    return checkpoint.parent, named


def read_config(folder: Path) -> PretrainConfig:
    """The configuration of a run folder, as it stands there.

    Raises:
        CheckpointError: the folder is none of a run.
        ConfigError: the configuration is damaged.
    """
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"{folder} holds no config.yaml: is it the folder of a run?")
    return load_config(folder / "config.yaml")


def find_run(
    folder: Path, step: int | None = None, progress: ByteProgress = unseen
) -> tuple[FoundCheckpoint, PretrainConfig]:
    """A checkpoint of a run folder, and its configuration; no weights are read.

    Args:
        step: whose checkpoint it is; the newest sound one where None.
        progress: of comparing it with its manifest.

    Raises:
        CheckpointError: there is no usable checkpoint, it lacks a module, or it is of another model
            than the configuration describes.
        ConfigError: the configuration is damaged.
    """
    config = read_config(folder)
    if step is None:
        newest = find_checkpoint(folder, progress=progress)
        if newest is None:
            raise CheckpointError(f"{folder} holds no checkpoint yet")
        found = newest
    else:
        found = find_step(folder, step, progress)
    _check_modules(found.path, found.manifest.modules)
    _check_model(found, config.model)
    return found, config


def _check_model(found: FoundCheckpoint, model: ModelConfig) -> None:
    """Raise CheckpointError unless a checkpoint is of the model that the configuration describes.

    An edited configuration, or another run's, may fit all shapes and compute something else.
    """
    require_same(
        {"model": asdict(model)},
        found.manifest.facts,
        "answer with",
        complaint=f"config.yaml does not describe the model of {found.path}",
        remedy="restore the configuration that the checkpoint was written with",
    )


def _warn_of_rounding(found: FoundCheckpoint, model: DAttnVLM) -> None:
    """Say it if the model computes with fewer digits than the checkpoint has."""
    parameters = dict(model.named_parameters())
    stored = open_tensors(found.path)
    rounded = [
        name
        for name, tensor in stored.items()
        if name in parameters and tensor.dtype.itemsize > parameters[name].dtype.itemsize
    ]
    if rounded:
        logger.warning(
            "%d parameters of %s are rounded to bf16, as its config.yaml says or leaves open; "
            "execution.precision: fp32 in there keeps all their digits",
            len(rounded),
            found.path,
        )


def _check_modules(path: Path, modules: tuple[str, ...]) -> None:
    missing = {"vision_model", "adapter", "language_model"} - set(modules)
    if missing:
        raise CheckpointError(
            f"{path} has no {', '.join(sorted(missing))}: train at least stage 1 before generating"
        )


def model_device(model: torch.nn.Module) -> torch.device:
    """The device of the model's parameters."""
    return next(model.parameters()).device
