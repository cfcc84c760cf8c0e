"""Opens a run: its parts, checkpoints and logs; what does not fit is refused before any step."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dattn.checkpoint.collective import on_first_rank
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.planner.hardware import device_peak
from megatron_dattn.runtime.distributed import get_device, is_rank_0
from megatron_dattn.runtime.lost_ranks import LostRankError
from megatron_dattn.training.build import (
    build_state,
    make_checkpointer,
    make_loader,
    run_on_all_ranks,
)
from megatron_dattn.training.checkpoint import Checkpointer
from megatron_dattn.training.checks import StartChecks, raise_first
from megatron_dattn.training.exits import FILE_NAME, clear_exit_reason, ending_of, record_exit
from megatron_dattn.training.ledger import SampleLedger
from megatron_dattn.training.metrics import Metrics
from megatron_dattn.training.optimizer import check_peak_rates
from megatron_dattn.training.plan import make_plan
from megatron_dattn.training.run import Run
from megatron_dattn.training.run_folder import describe_run
from megatron_dattn.training.run_lock import RunLock
from megatron_dattn.training.state import TrainState
from megatron_dattn.training.stream import BatchStream
from megatron_dattn.training.validate import Validation

logger = logging.getLogger(__name__)


def prepare_run(config: PretrainConfig) -> int | None:
    """Check all that can be checked before something is built. Collective; `start` comes first.

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


@contextlib.contextmanager
def own_run_folder(folder: str | None) -> Iterator[None]:
    """Keep other runs out of the save folder, if there is one. Collective.

    Raises:
        UserError: on all ranks: another run is at work there.
    """
    locks: list[RunLock] = []

    def take(folder: str) -> None:
        locks.append(RunLock.acquire(folder))
        # A former run's note must not outlive a sudden end of this one.
        clear_exit_reason(folder)

    try:
        if folder is not None:
            on_first_rank(f"writing into {folder}", lambda: take(folder))
        yield
    except LostRankError as error:
        # Rank 0, frozen, may still hold the lock: afterwards its folder would look like another's.
        if folder is not None and not locks and not (Path(folder) / FILE_NAME).exists():
            record_exit(folder, ending_of(error))
        raise
    finally:
        for lock in locks:
            lock.release()


@contextlib.contextmanager
def open_run(config: PretrainConfig) -> Iterator[Run]:
    """A run that is ready to train: resumed, started from other weights, or fresh. Collective.

    `prepare_run` comes first.

    Raises:
        UserError: on all ranks: settings, data or checkpoints that do not fit.
    """
    checkpointer = run_on_all_ranks(lambda: make_checkpointer(config))
    state = build_state(config)
    restore(config, checkpointer, state)
    run = Run(
        config=config,
        state=state,
        stream=BatchStream(state.loader, get_device()),
        num_microbatches=config.training.num_microbatches(
            parallel_state.get_data_parallel_world_size()
        ),
        seq_length=config.data.visual_budget + config.data.text_budget,
        metrics=run_on_all_ranks(lambda: make_metrics(config, state)),
        checkpointer=checkpointer if config.checkpoint.save else None,
        validation=make_validation(config),
        ledger=run_on_all_ranks(lambda: make_ledger(config, state)),
    )
    try:
        if run.validation is not None:
            run.validation.require_packs()
        describe_start(run)
        yield run
    finally:
        run.close()


def restore(config: PretrainConfig, checkpointer: Checkpointer, state: TrainState) -> None:
    """Resume the stage if it was begun; else load the weights it starts from, if any. Collective.

    Afterwards the run folder describes this run: not before, so that a configuration that does not
    fit its checkpoints leaves no trace.
    """
    if checkpointer.resume(state):
        check_peak_rates(config.optimizer, state.optimizer)
    elif config.checkpoint.load:
        checkpointer.load_weights(state, config.checkpoint.load)
    elif is_rank_0():
        logger.warning("checkpoint.load is not set: the model starts from random weights")
    folder = config.checkpoint.save
    if folder is not None:
        on_first_rank(f"writing into {folder}", lambda: describe_run(config, Path(folder)))


def make_metrics(config: PretrainConfig, state: TrainState) -> Metrics:
    """The log of this run; on rank 0 it opens TensorBoard's file."""
    return Metrics(
        config.logging,
        stage=config.training.stage,
        train_iters=config.training.train_iters,
        first_step=state.progress.step,
        world_size=dist.get_world_size(),
        peak_flops=device_peak(config.execution.precision),
    )


def make_validation(config: PretrainConfig) -> Validation | None:
    """None where no validation is asked for."""
    if config.training.eval_interval == 0:
        return None
    return Validation(
        lambda: run_on_all_ranks(
            lambda: make_loader(config, config.data.validation, training=False)
        ),
        max_microbatches=config.training.eval_iters,
        seq_length=config.data.visual_budget + config.data.text_budget,
        max_skipped_fraction=config.data.max_skipped_fraction,
    )


def make_ledger(config: PretrainConfig, state: TrainState) -> SampleLedger | None:
    """The ledger of this data-parallel rank, on the first of the ranks that load its data."""
    writes = state.loader is not None and parallel_state.is_pipeline_first_stage()
    if config.logging.sample_ledger is None or not writes:
        return None
    return SampleLedger(
        config.logging.sample_ledger,
        parallel_state.get_data_parallel_rank(),
        resumed_step=state.progress.step,
    )


def describe_start(run: Run) -> None:
    """Say what is about to be trained, and how."""
    training, parallel = run.config.training, run.config.parallel
    logger.info(
        "stage %s: %d ranks = tensor %d x pipeline %d x data %d, %s, attention %s",
        training.stage,
        dist.get_world_size(),
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel_state.get_data_parallel_world_size(),
        run.config.execution.precision,
        run.config.model.attention,
    )
    logger.info(
        "iterations %d to %d, global batch of up to %d samples in %d packs of %d visual + %d text "
        "tokens per data-parallel rank",
        run.state.progress.step + 1,
        training.train_iters,
        training.global_batch_size,
        run.num_microbatches,
        run.config.data.visual_budget,
        run.config.data.text_budget,
    )
