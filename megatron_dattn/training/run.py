"""A run of one stage: its parts, and how they are built, one after the other, from a configuration.

`join_ranks` comes first, then what `checks.py` says, then `open_run`.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.data.loader import VLMLoader
from megatron_dattn.data.skipped_samples import RecentSamples
from megatron_dattn.data.tokenizer import tokenizer_sha256
from megatron_dattn.planner.hardware import device_peak
from megatron_dattn.runtime.distributed import (
    get_device,
    initialize_distributed,
    is_rank_0,
    join_world,
    seed_everything,
)
from megatron_dattn.runtime.rank_errors import all_ranks_agree, on_first_rank, run_on_all_ranks
from megatron_dattn.runtime.same_facts import all_ranks_have_same
from megatron_dattn.training.checkpoint import Checkpointer
from megatron_dattn.training.metrics import Metrics
from megatron_dattn.training.optimizer import build_optimizer, build_scheduler, describe_optimizer
from megatron_dattn.training.preflight import check_machines
from megatron_dattn.training.resume_changes import compared_settings
from megatron_dattn.training.run_folder import describe_again, describe_run
from megatron_dattn.training.sample_ledger import SampleLedger, drop_later_steps
from megatron_dattn.training.stages import build_training_model, trained_modules
from megatron_dattn.training.start_facts import settings_of, start_facts
from megatron_dattn.training.state import TrainState
from megatron_dattn.training.stream import BatchStream, make_loader
from megatron_dattn.training.validate import Validation

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """One run of one stage on this rank."""

    config: PretrainConfig
    state: TrainState
    """Everything a checkpoint holds: weights, optimizer, schedule, loader, counters."""
    stream: BatchStream
    metrics: Metrics
    checkpointer: Checkpointer | None = None
    """None where nothing is saved."""
    validation: Validation | None = None
    ledger: SampleLedger | None = None
    """Only on the ranks that load, if a ledger is kept."""
    num_microbatches: int = field(init=False)
    seq_length: int = field(init=False)
    """Tokens of one pack on a context-parallel rank, padding included."""
    trained: frozenset[str] = field(init=False)
    """Modules that are not frozen."""
    recent_samples: RecentSamples = field(init=False)
    """Judges whether too many of them could not be used."""

    def __post_init__(self) -> None:
        config = self.config
        replicas = parallel_state.get_data_parallel_world_size()
        self.num_microbatches = config.training.num_microbatches(replicas)
        self.seq_length = config.tokens_per_rank
        self.trained = frozenset(trained_modules(config.optimizer.learning_rates))
        self.recent_samples = RecentSamples(config.data.max_skipped_fraction)

    def describe_again(self) -> None:
        """Write configuration and tokenizer anew if the run folder was deleted."""
        if self.config.checkpoint.save is not None:
            describe_again(self.config, Path(self.config.checkpoint.save))

    def sync_ledger(self) -> None:
        """Force this rank's ledger to the disk, if it keeps one."""
        if self.ledger is not None:
            self.ledger.sync()

    def close(self) -> None:
        """Close what has open files, and give up what is still being saved."""
        if self.checkpointer is not None:
            self.checkpointer.close()
        self.metrics.close()
        if self.ledger is not None:
            self.ledger.close()


def join_ranks(config: PretrainConfig) -> None:
    """Join the process group, compare the ranks, build their groups and try them, seed. Collective.

    Raises:
        UserError: on all ranks: one of them was started wrongly, or otherwise than the others.
    """
    parallel = config.parallel
    timeout_seconds = 60 * parallel.distributed_timeout_minutes
    join_world(
        timeout_seconds=timeout_seconds,
        rendezvous_seconds=60 * parallel.rendezvous_timeout_minutes,
    )
    all_ranks_agree(None)  # with a rank that could not read its command line: share_refusal
    all_ranks_have_same(start_facts(config))
    initialize_distributed(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        timeout_seconds=timeout_seconds,
    )
    check_machines()
    seed_everything(config.training.seed)


@contextlib.contextmanager
def open_run(config: PretrainConfig) -> Iterator[Run]:
    """A run that is ready to train: resumed, started from other weights, or fresh. Collective.

    `checks.check_start` comes first.

    Raises:
        UserError: on all ranks: settings, data or checkpoints that do not fit.
    """
    checkpointer = run_on_all_ranks(lambda: make_checkpointer(config))
    state = build_state(config, build_training_model(config))
    for line in describe_optimizer(state.optimizer):
        logger.info(line)
    state.loader = run_on_all_ranks(lambda: make_loader(config, config.data.train, training=True))
    restore(config, checkpointer, state)
    run = Run(
        config=config,
        state=state,
        stream=BatchStream(state.loader, get_device()),
        metrics=run_on_all_ranks(lambda: make_metrics(config, state)),
        checkpointer=checkpointer if config.checkpoint.save else None,
        validation=make_validation(config),
        ledger=run_on_all_ranks(
            lambda: make_ledger(config, state, checkpointer.resumed_data_parallel_size)
        ),
    )
    try:
        if run.validation is not None:
            run.validation.require_packs()
        describe_start(run)
        yield run
    finally:
        run.close()


def make_checkpointer(config: PretrainConfig, tokenizer: str | None = None) -> Checkpointer:
    """Make what saves and resumes this run, and knows what it must not be mixed up with.

    Args:
        tokenizer: sha256 of the tokenizer; read where None.

    Raises:
        ConfigError: there is no tokenizer.
    """
    compared = compared_settings(config)
    return Checkpointer(
        config.checkpoint,
        model=dataclasses.asdict(config.model),
        tokenizer=tokenizer or tokenizer_sha256(config.data.tokenizer),
        stage=config.training.stage,
        recipe=compared["recipe"],
        schedule=compared["schedule"],
        settings=settings_of(config),
        data_sets=[Path(data.path).name for data in config.data.train],
        num_loader_workers=config.data.num_workers,
    )


def build_state(
    config: PretrainConfig,
    chunks: list[DistributedDataParallel],
    loader: VLMLoader | None = None,
) -> TrainState:
    """A model that is there, with a new optimizer and schedule. Collective."""
    optimizer = build_optimizer(
        config.optimizer,
        chunks,
        bf16=config.execution.precision == "bf16",
        use_distributed_optimizer=chunks[0].ddp_config.use_distributed_optimizer,
    )
    scheduler = build_scheduler(config.optimizer, optimizer, config.training.train_iters)
    return TrainState(chunks, optimizer, scheduler, loader)


def restore(config: PretrainConfig, checkpointer: Checkpointer, state: TrainState) -> None:
    """Resume the stage if it was begun; else load the weights it starts from, if any. Collective.

    Afterwards the run folder describes this run: not before, so that a configuration that does not
    fit its checkpoints leaves no trace.
    """
    if not checkpointer.resume(state):
        if config.checkpoint.load:
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
        seq_length=config.tokens_per_rank,
        max_skipped_fraction=config.data.max_skipped_fraction,
    )


def make_ledger(
    config: PretrainConfig, state: TrainState, resumed_size: int | None = None
) -> SampleLedger | None:
    """The ledger of this data-parallel rank, on the rank that loads its data.

    Args:
        resumed_size: data-parallel size of the run that is gone on with; None where there is none.
    """
    folder, rank = config.logging.sample_ledger, parallel_state.get_data_parallel_rank()
    if folder is None or state.loader is None:
        return None
    step = state.progress.step
    if rank == 0:
        drop_later_steps(folder, parallel_state.get_data_parallel_world_size(), step)
    is_new = resumed_size is not None and rank >= resumed_size
    return SampleLedger(folder, rank, resumed_step=step, is_new_rank=is_new)


def describe_start(run: Run) -> None:
    """Say what is about to be trained, and how."""
    training, parallel = run.config.training, run.config.parallel
    logger.info(
        "stage %s: %d ranks = tensor %d x pipeline %d x context %d x data %d, %s, attention %s",
        training.stage,
        dist.get_world_size(),
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
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
