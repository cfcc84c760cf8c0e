"""Saves a training run, resumes it exactly, and starts a stage from another one's weights.

`Checkpointer` decides when a checkpoint fits; what of a run it holds is the business of
`state.py`, how it reaches the disk whole that of megatron_dattn/checkpoint. Resuming restores
everything (weights, optimizer, schedule, random states, the loader's place, counters) and is
refused if the model, the tokenizer or the stage differs. All methods are
collective over the world.
"""

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from megatron_dattn.checkpoint.background import Background
from megatron_dattn.checkpoint.chunk_bytes import HostMemory
from megatron_dattn.checkpoint.commit import (
    LocalWork,
    Steps,
    parallel_layout,
    run_to_end,
    save_steps,
)
from megatron_dattn.checkpoint.discovery import FoundCheckpoint, find_checkpoint_together, prune
from megatron_dattn.checkpoint.files import replace_synced, step_folder_name
from megatron_dattn.checkpoint.load import load_checkpoint
from megatron_dattn.checkpoint.manifest import read_listed
from megatron_dattn.config.training import CheckpointConfig
from megatron_dattn.data.loader_state import deal_states_anew
from megatron_dattn.errors import CheckpointError, UserError
from megatron_dattn.models.added_parameters import comes_with_preset, holds_preset
from megatron_dattn.models.model_identity import require_same
from megatron_dattn.runtime.distributed import rank
from megatron_dattn.runtime.os_errors import explain, shortage
from megatron_dattn.runtime.rank_errors import on_all_ranks, on_first_rank
from megatron_dattn.training.flat_state import older_names
from megatron_dattn.training.resume_changes import RunSettings
from megatron_dattn.training.stages import MODULES
from megatron_dattn.training.state import (
    Progress,
    TrainState,
    added_parameters,
    check_finite,
    load_modules,
    loader_file,
    local_files,
    model_state,
    restore_state,
    rng_file,
    sharded_state,
)

logger = logging.getLogger(__name__)

REPORT_FILE = "resume_report.json"
# A conversion of Hugging Face models has no adapter (nor what a preset adds to the decoder layers,
# which counts as the adapter's): stage 1 trains it from its initial values.
_MAY_BE_ABSENT = {"adapter"}
# For a block to be written, or the index, by a disk that may hang.
_PATIENCE_SECONDS = 10.0
# What a stage remembers of the checkpoint that it started from, and so of all that came before.
_OF_A_PARENT = ("stage", "data_sets", "sources", "parent")


class Checkpointer:
    """Saves into, and resumes from, the folder of one stage.

    Args:
        config: where to, how many to keep, whether to compare sums.
        model: the model's description as plain data (`asdict(ModelConfig)`), compared on load.
        tokenizer: sha256 of the tokenizer, compared on load.
        stage: name of the stage; only its own checkpoints are resumed.
        recipe: further plain data that must be equal on resume but not between stages: batch
            size, optimizer settings.
        schedule: what the learning rates and the stage's end follow from: `train_iters` and the
            optimizer's rates; equal on resume too. `checkpoint.change_on_resume` names what of
            recipe and schedule may differ.
        settings: of the run, by full name; what a resume changes of them is told and recorded.
        data_sets: names of the training data; they are recorded, for those who ask later what a
            model has seen.
        num_loader_workers: loader processes per data-parallel rank.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        model: Mapping[str, Any],
        tokenizer: str,
        stage: str,
        recipe: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        data_sets: Sequence[str] = (),
        num_loader_workers: int = 0,
    ) -> None:
        self._config = config
        self._folder = Path(config.save) if config.save else None
        self._model = dict(model)
        self._tokenizer = tokenizer
        self._stage = stage
        self._run_settings = RunSettings(
            recipe or {}, schedule or {}, settings or {}, config.change_on_resume
        )
        self._data_sets = list(data_sets)
        self._num_loader_workers = num_loader_workers
        self._parent: dict[str, Any] | None = None
        self._memory = HostMemory()
        self._under_way: Background[Path] | None = None
        self._has_waited = False
        self.resumed_data_parallel_size: int | None = None
        """Of the run whose checkpoint was resumed; None where none was."""

    def save(self, state: TrainState, *, beside: bool = False) -> Path:
        """Save everything under the step of `state.progress`, then delete old checkpoints.

        A save that is still under way is waited for.

        Args:
            beside: return as soon as the state is copied, if `checkpoint.asynchronous`; `advance`,
                once per step, or `finish` does the rest.

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: on all ranks; older checkpoints are untouched. Also if a parameter is
                not finite: such a state is never saved.
        """
        if self._folder is None:
            raise CheckpointError("checkpoint.save is not set: there is no folder to save into")
        beside = beside and self._config.asynchronous
        self._finish_before(state.progress.step, is_slow=beside)
        on_all_ranks("checking the parameters", lambda: check_finite(state.chunks))
        extra_files = on_all_ranks("collecting the state", lambda: local_files(state))
        cancelled = threading.Event()
        steps = self._save_steps(state, extra_files, cancelled if beside else None)
        if not beside:
            return run_to_end(steps)
        self._under_way = Background(steps, cancelled)
        return self._folder / step_folder_name(state.progress.step)

    def _save_steps(
        self,
        state: TrainState,
        extra_files: Mapping[str, bytes],
        cancelled: threading.Event | None,
    ) -> Steps[Path]:
        assert self._folder is not None
        step = state.progress.step
        path = yield from save_steps(
            self._folder,
            step,
            sharded_state(state, is_loading=False),
            facts=self._facts(state),
            extra_files=extra_files,
            memory=None if cancelled is None else self._memory,
            cancelled=cancelled,
        )
        if rank() == 0:
            logger.info("saved %s", path)
        prune_here = (lambda: self._prune(step)) if rank() == 0 else (lambda: None)
        yield LocalWork("deleting old checkpoints", prune_here)
        return path

    def _finish_before(self, step: int, *, is_slow: bool) -> None:
        """Wait for the save before this one; say once that training waits, if it is too slow."""
        if self.advance():
            return
        if rank() == 0 and is_slow and not self._has_waited:
            logger.warning(
                "the save before that of step %d is still being written: training waits for it; "
                "raise checkpoint.save_interval or use a faster disk (said once)",
                step,
            )
        self._has_waited = self._has_waited or is_slow
        self.finish()

    def advance(self) -> bool:
        """Go on with a save that is under way, without waiting for it. Collective.

        Returns:
            Whether none is under way any more.

        Raises:
            CheckpointError: on all ranks, if it has failed; older checkpoints are untouched.
        """
        return self._under_way is None or self._has_ended(self._under_way.advance)

    def finish(self) -> None:
        """Wait for a save that is under way; errors as for `advance`. Collective."""
        if self._under_way is not None:
            self._has_ended(self._under_way.finish)

    def _has_ended(self, go_on: Callable[[], object]) -> bool:
        try:
            has_ended = bool(go_on())
        except UserError:
            self._under_way = None
            raise
        if has_ended:
            self._under_way = None
        return has_ended

    def close(self) -> None:
        """Give up a save that is under way, without the other ranks, who may be gone.

        What it leaves behind is removed by the next save.
        """
        if self._under_way is not None:
            self._under_way.abandon(_PATIENCE_SECONDS)
            self._under_way = None

    def resume(self, state: TrainState) -> bool:
        """Restore the newest sound checkpoint of the own folder into `state`.

        Returns:
            False if there is none yet; `state` is untouched then.

        Raises:
            CheckpointError: if there are checkpoints but none is usable or fits this run.
        """
        if self._folder is None:
            return False
        found = find_checkpoint_together(self._folder, self._config.verify)
        if found is None:
            return False
        self.require_own(found)
        progress = self._progress_of(found)
        random_state = self._random_state_note(found)
        size = parallel_state.get_data_parallel_world_size()
        loaders = None
        if found.manifest.facts.get("loader") not in (None, self._loader_facts(size)):
            # By one rank: a thousand that read a thousand small files each would take minutes.
            loaders = on_first_rank(
                f"reading {found.path}", lambda: self.loader_states(found, size)
            )
        local = on_all_ranks(
            f"reading {found.path}",
            lambda: self._read_local_files(found, state, loaders, random_state == "restored"),
        )
        loaded = load_checkpoint(
            found.path, sharded_state(state, is_loading=True), older_names=older_names
        )
        on_all_ranks(
            f"restoring {found.path}",
            lambda: restore_state(
                state, self._run_settings.adopt(state, loaded, found), local, found.path
            ),
        )
        for name, value in progress.to_json().items():
            setattr(state.progress, name, value)
        self._run_settings.tell(state)
        state.validation = found.manifest.facts.get("validation")
        self._parent = found.manifest.facts.get("parent")
        if (loader := found.manifest.facts.get("loader")) is not None:
            self.resumed_data_parallel_size = loader["data_parallel_size"]
        self._report(found, random_state, "dealt anew" if loaders else "restored")
        return True

    def load_weights(self, state: TrainState, path: str | Path) -> None:
        """Start a stage: the weights of a conversion or an earlier stage, everything else fresh.

        A conversion that lacks the adapter, or what the preset adds to a plain model, leaves those
        parameters as they were initialized, with a warning.

        Args:
            path: a folder of checkpoints (the newest sound one is taken) or one checkpoint.

        Raises:
            CheckpointError: if there is none, or model or tokenizer differ.
        """
        found = find_checkpoint_together(path, self._config.verify)
        if found is None:
            raise nothing_to_load(path)
        absent = self.require_parent(found)
        plain = not holds_preset(found.manifest.facts)
        present = [name for name in MODULES if name not in absent]
        loaded = load_checkpoint(
            found.path,
            model_state(state.chunks),
            modules=present,
            without=comes_with_preset if plain else None,
        )
        on_all_ranks(
            "loading the weights", lambda: load_modules(state.chunks, loaded, present, plain)
        )
        scale = unwrap_model(state.model).start_at_text_scale() if plain else None
        state.optimizer.reload_model_params()
        self._parent = {
            "path": str(found.path),
            "step": found.step,
            **{name: found.manifest.facts.get(name) for name in _OF_A_PARENT},
        }
        if rank() == 0:
            logger.info("weights of %s loaded from %s", ", ".join(present), found.path)
            for name in sorted(absent):
                logger.warning("NO %s IN %s: IT STARTS FROM RANDOM VALUES", name, found.path)
            if scale is not None:
                logger.info("visual tokens start at the scale of the token embeddings, %.4g", scale)
            added = added_parameters(state.chunks, absent) if plain else {}
            if added:
                logger.warning(
                    "%s parameters (on this rank) that the attention preset adds are not in %s: "
                    "%s keep their initial values",
                    f"{sum(added.values()):,}",
                    found.path,
                    ", ".join(added),
                )

    def require_own(self, found: FoundCheckpoint) -> None:
        """Refuse a checkpoint of the own folder that another run has written. Local.

        Raises:
            CheckpointError: naming the settings that differ.
        """
        identity = {"model": self._model, "tokenizer": self._tokenizer}
        self._run_settings.require_same_run(found, {**identity, "stage": self._stage})

    def require_parent(self, found: FoundCheckpoint) -> set[str]:
        """Refuse a checkpoint from whose weights this stage cannot start. Local.

        Returns:
            The modules that it does not hold and that may start from their initial values.

        Raises:
            CheckpointError: naming the modules that are missing or the settings that differ.
        """
        absent = set(MODULES) - set(found.manifest.modules)
        if absent - _MAY_BE_ABSENT:
            raise CheckpointError(
                f"{found.path} holds no weights of {', '.join(sorted(absent - _MAY_BE_ABSENT))}"
            )
        identity = {"model": self._model, "tokenizer": self._tokenizer}
        require_same(
            identity,
            found.manifest.facts,
            "start from",
            complaint=f"{found.path} belongs to another run",
            remedy="correct the configuration, or give another checkpoint folder",
        )
        return absent

    def loader_states(self, found: FoundCheckpoint, data_parallel_size: int) -> list[bytes]:
        """The loaders' places of all data-parallel ranks that there are now, by rank. Local.

        Where their number, or that of their loader processes, is another than the checkpoint's,
        the data is dealt anew.

        Raises:
            CheckpointError: the checkpoint does not hold them.
        """
        stored = _require_loader(found)
        states = [
            read_listed(found.path, found.manifest, loader_file(number))
            for number in range(stored["data_parallel_size"])
        ]
        if stored == self._loader_facts(data_parallel_size):
            return states
        return deal_states_anew(states, data_parallel_size, self._num_loader_workers)

    def _facts(self, state: TrainState) -> dict[str, Any]:
        loader = None
        if state.loader is not None:
            loader = self._loader_facts(parallel_state.get_data_parallel_world_size())
        return {
            "model": self._model,
            "modules": list(MODULES),
            "tokenizer": self._tokenizer,
            "stage": self._stage,
            **self._run_settings.facts(),
            "data_sets": self._data_sets,
            "step": state.progress.step,
            "progress": state.progress.to_json(),
            "validation": state.validation,
            "loader": loader,
            "parent": self._parent,
        }

    def _loader_facts(self, data_parallel_size: int) -> dict[str, int]:
        return {
            "data_parallel_size": data_parallel_size,
            "num_workers": self._num_loader_workers,
        }

    def _progress_of(self, found: FoundCheckpoint) -> Progress:
        progress = Progress.from_json(found.manifest.facts.get("progress", {}))
        if progress.step != found.step:
            raise CheckpointError(
                f"{found.path} is of step {found.step}, but its progress of step {progress.step}; "
                "use another checkpoint of the run"
            )
        return progress

    def _random_state_note(self, found: FoundCheckpoint) -> str:
        now = parallel_layout()
        if now == found.manifest.layout:
            return "restored"
        return (
            f"fresh, as the parallel layout changed from {_spell(found.manifest.layout)} to "
            f"{_spell(now)}"
        )

    def _read_local_files(
        self,
        found: FoundCheckpoint,
        state: TrainState,
        loaders: Sequence[bytes] | None,
        with_random_state: bool,
    ) -> dict[str, bytes]:
        """This rank's files; its loader's place is one of `loaders` where it is not stored."""
        local = {}
        if with_random_state:
            local["rng"] = read_listed(found.path, found.manifest, rng_file())
        if state.loader is not None:
            _require_loader(found)
            if loaders is None:
                local["loader"] = read_listed(found.path, found.manifest, loader_file())
            else:
                local["loader"] = loaders[parallel_state.get_data_parallel_rank()]
        return local

    def _prune(self, step: int) -> None:
        assert self._folder is not None
        try:
            for path in prune(self._folder, self._config.keep_last, newest=step):
                logger.info("deleted %s", path)
        except (OSError, MemoryError) as error:
            logger.warning("old checkpoints are not deleted: %s", shortage(error) or error)

    def _report(self, found: FoundCheckpoint, random_state: str, data: str) -> None:
        report = {
            "resumed_from": str(found.path),
            "step": found.step,
            "passed_over": list(found.passed_over),
            "random_state": random_state,
            "data": data,
        }
        folder = found.path.parent

        def write() -> None:
            logger.info("resumed from %s at step %d", found.path, found.step)
            if random_state != "restored":
                logger.warning("random states are %s", random_state)
            if data != "restored":
                logger.warning(
                    "the rest of the data is dealt anew, as the data-parallel size or "
                    "data.num_workers changed: no sample is lost or repeated, packs are others"
                )
            content = (json.dumps(report, indent=1) + "\n").encode()
            try:
                replace_synced(folder / REPORT_FILE, content)
            except OSError as error:  # it only tells; what is resumed is resumed
                logger.warning("%s is not written: %s", REPORT_FILE, explain(error))

        on_first_rank("writing the resume report", write)


def _require_loader(found: FoundCheckpoint) -> dict[str, int]:
    """What the checkpoint says of its loaders' ranks and processes."""
    loader = found.manifest.facts.get("loader")
    if loader is None:
        raise CheckpointError(f"{found.path} does not hold the loader's place in the data")
    return loader


def nothing_to_load(path: str | Path) -> CheckpointError:
    """The error to raise where `checkpoint.load` holds no checkpoint."""
    return CheckpointError(
        f"there is no checkpoint in {path}; convert the models or train the earlier stage first, "
        "or correct checkpoint.load"
    )


def _spell(layout: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in sorted(layout.items()))
