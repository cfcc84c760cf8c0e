"""What can be known of a start on this machine before anything is built.

One list for the real start and the dry run, so that the dry run finds whatever would end a run in
its first minutes: packages, backends, tokenizer, data sets, checkpoints, folders to write into.
What follows from the configuration alone is in `run_plan.py`. Nothing here writes.
"""

import contextlib
import importlib.util
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_dattn.attention.backends.select import select_backend
from megatron_dattn.checkpoint.discovery import FoundCheckpoint, find_checkpoint, steps_of
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.config.written_folders import check_place
from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.data.dataset import open_dataset
from megatron_dattn.data.loader import VLMLoader
from megatron_dattn.data.tokenizer import load_tokenizer, tokenizer_sha256
from megatron_dattn.errors import ConfigError, UserError
from megatron_dattn.models.layer_specs import resolve_implementation
from megatron_dattn.planner.memory import checkpoint_bytes
from megatron_dattn.runtime.distributed import get_device
from megatron_dattn.runtime.os_errors import explain
from megatron_dattn.runtime.random_states import untouched_random_states
from megatron_dattn.runtime.rank_errors import on_first_rank, run_on_all_ranks
from megatron_dattn.training.checkpoint import nothing_to_load
from megatron_dattn.training.run import make_checkpointer
from megatron_dattn.training.run_plan import make_plan
from megatron_dattn.training.stages import trained_modules
from megatron_dattn.training.stream import loader_of_rank


class StartChecks:
    """The checks of one configuration."""

    def __init__(
        self, config: PretrainConfig, data_parallel_size: int | None, *, quiet: bool = False
    ) -> None:
        """
        Args:
            data_parallel_size: None if it is not known (a plan without a world size): what depends
                on it is then not checked.
            quiet: the loaders that are built on trial log nothing: the run's own will.
        """
        self._config = config
        self._quiet = quiet
        self._data_parallel_size = data_parallel_size

    def on_every_host(self) -> list[UserError]:
        """Mistakes in packages and data: each host has its own."""
        data = self._config.data
        validation = data.validation if self._config.training.eval_interval else []
        return _problems(
            (
                self._check_packages,
                self._check_backend,
                self._check_tokenizer,
                *(partial(open_dataset, dataset) for dataset in [*data.train, *validation]),
                self._check_loaders,
            )
        )

    def in_shared_folders(self) -> list[UserError]:
        """Mistakes in checkpoints and the folders to write into."""
        config = self._config
        written = {
            "checkpoint.save": config.checkpoint.save,
            "logging.tensorboard_dir": config.logging.tensorboard_dir,
            "logging.sample_ledger": config.logging.sample_ledger,
        }
        return _problems(
            (
                self._check_checkpoints,
                *(
                    partial(check_place, name, Path(folder))
                    for name, folder in written.items()
                    if folder is not None
                ),
                self._check_room,
            )
        )

    def steps_if_finished(self) -> int | None:
        """The steps of the stage if its own folder says that they are all done.

        Raises:
            UserError: there is a last checkpoint, but of another run.
        """
        folder, last_step = self._config.checkpoint.save, self._config.training.train_iters
        if folder is None or last_step not in steps_of(Path(folder)):
            return None
        found = self._own_checkpoint()
        # Older checkpoints do not tell their schedule, and 5 of 5 steps might be 5 of 10 there.
        if found is None or found.step != last_step or not found.manifest.facts.get("schedule"):
            return None
        return last_step

    def save_folder_is_own(self) -> bool:
        """True if the save folder is free or holds this run; a tokenizer may be missing."""
        try:
            self._own_checkpoint(tokenizer_may_be_missing=True)
        except (UserError, OSError):
            return False
        return True

    def _own_checkpoint(self, tokenizer_may_be_missing: bool = False) -> FoundCheckpoint | None:
        """The newest checkpoint that this run would resume; only sizes of files are compared."""
        folder = self._config.checkpoint.save
        found = find_checkpoint(folder, verify=False) if folder else None
        if found is None:
            return None
        try:
            checkpointer = make_checkpointer(self._config)
        except ConfigError:
            if not tokenizer_may_be_missing:
                raise
            checkpointer = make_checkpointer(self._config, found.manifest.facts["tokenizer"])
        checkpointer.require_own(found)
        return found

    def _check_packages(self) -> None:
        resolve_implementation(self._config.execution)
        if self._config.logging.tensorboard_dir and not importlib.util.find_spec("tensorboard"):
            raise ConfigError(
                "logging.tensorboard_dir is set, but the package tensorboard is not installed; "
                "install it or leave the setting out"
            )

    def _check_backend(self) -> None:
        execution, language = self._config.execution, self._config.model.language
        select_backend(
            execution.attention_backend,
            get_device(),
            torch.float32 if execution.precision == "fp32" else torch.bfloat16,
            language.head_dim,
            softcap=language.attn_logit_softcapping,
        )

    def _check_tokenizer(self) -> None:
        data = self._config.data
        vocab_size = self._config.model.language.vocab_size
        load_tokenizer(data.tokenizer, template=data.template, vocab_size=vocab_size)
        tokenizer_sha256(data.tokenizer)

    def _check_loaders(self) -> None:
        self._build_loader(self._config.data.train, training=True)
        if self._config.training.eval_interval:
            self._build_loader(self._config.data.validation, training=False)

    def _build_loader(self, datasets: Sequence[DatasetConfig], *, training: bool) -> VLMLoader:
        """The first data-parallel rank's loader, which reads no sample."""
        with _level_of_data_logs(logging.ERROR if self._quiet else logging.NOTSET):
            return loader_of_rank(
                self._config, datasets, 0, self._data_parallel_size or 1, training=training
            )

    def _check_checkpoints(self) -> None:
        found = self._own_checkpoint()
        if found is not None:
            self._check_resume(found)
        elif self._config.checkpoint.load:
            parent = find_checkpoint(self._config.checkpoint.load, verify=False)
            if parent is None:
                raise nothing_to_load(self._config.checkpoint.load)
            make_checkpointer(self._config).require_parent(parent)

    def _check_room(self) -> None:
        """Whether the first save can succeed: hours of training would be lost with it."""
        config, folder = self._config, self._config.checkpoint.save
        if folder is None:
            return
        trained = frozenset(trained_modules(config.optimizer.learning_rates))
        needed = checkpoint_bytes(config.model, config.execution, trained)
        there = next(
            path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists()
        )
        free = shutil.disk_usage(there).free
        if free < needed:
            raise ConfigError(
                f"checkpoint.save {folder}: a checkpoint of this stage takes {needed / 1e9:.1f} "
                f"GB, {free / 1e9:.1f} GB are free there; make room or name another folder"
            )

    def _check_resume(self, found: FoundCheckpoint) -> None:
        """Whether the data goes on where the checkpoint left it."""
        if self._data_parallel_size is None:
            return
        states = make_checkpointer(self._config).loader_states(found, self._data_parallel_size)
        self._build_loader(self._config.data.train, training=True).restore_state(states[0])


@contextlib.contextmanager
def _level_of_data_logs(level: int) -> Iterator[None]:
    logger = logging.getLogger("megatron_dattn.data")
    former = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(former)


def check_start(config: PretrainConfig) -> int | None:
    """Check all that can be checked before something is built. Collective, after `join_ranks`.

    Returns:
        The stage's last step if it is done already, else None.

    Raises:
        UserError: on all ranks: settings, data, folders or packages that would end the run later.
    """
    plan = make_plan(config, dist.get_world_size())
    checks = StartChecks(config, plan.data_parallel_size, quiet=True)
    steps = on_first_rank("looking into the save folder", checks.steps_if_finished)
    if steps is not None:
        return steps
    run_on_all_ranks(lambda: raise_first(checks.on_every_host()))
    raise_first(on_first_rank("looking into the folders", checks.in_shared_folders))
    return None


def raise_first(problems: Sequence[UserError]) -> None:
    """Raise the first problem; say if there are more.

    Raises:
        UserError: of that problem's class, if there is one.
    """
    if not problems:
        return
    more = f" (and {len(problems) - 1} more: --dry-run lists them)" if len(problems) > 1 else ""
    raise type(problems[0])(f"{problems[0]}{more}")


def _problems(checks: Iterable[Callable[[], object]]) -> list[UserError]:
    """What the checks find, each thing once.

    All of it: whoever mends one thing wants to know of the next.
    """
    found: dict[str, UserError] = {}
    with untouched_random_states():
        for check in checks:
            try:
                check()
            except UserError as error:
                found.setdefault(str(error), error)
            except OSError as error:
                found.setdefault(explain(error), UserError(explain(error)))
    return list(found.values())
