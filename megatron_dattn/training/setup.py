"""Builds a run from its configuration: process groups, model, optimizer, loaders, checkpoints."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer.module import Float16Module
from torch import nn

from megatron_dattn.attention import select_backend
from megatron_dattn.checkpoint.collective import on_first_rank
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.data.loader import VLMLoader, build_loader
from megatron_dattn.data.tokenizer import tokenizer_sha256
from megatron_dattn.errors import ConfigError, UserError
from megatron_dattn.models.build import build_model
from megatron_dattn.models.config import ExecutionConfig
from megatron_dattn.runtime.distributed import (
    all_ranks_agree,
    get_device,
    initialize_distributed,
    is_rank_0,
    seed_everything,
)
from megatron_dattn.training.checkpoint import Checkpointer
from megatron_dattn.training.config import TrainingConfig
from megatron_dattn.training.ledger import SampleLedger
from megatron_dattn.training.metrics import Metrics
from megatron_dattn.training.optimizer import (
    build_optimizer,
    build_scheduler,
    check_peak_rates,
    describe_optimizer,
)
from megatron_dattn.training.peak_flops import device_peak
from megatron_dattn.training.run import Run
from megatron_dattn.training.run_folder import describe_run
from megatron_dattn.training.stages import (
    count_parameters,
    describe_modules,
    every_pipeline_stage_trains,
    freeze_modules,
)
from megatron_dattn.training.state import TrainState
from megatron_dattn.training.stream import BatchStream
from megatron_dattn.training.validate import Validation

logger = logging.getLogger(__name__)

T = TypeVar("T")


def execution_config(training: TrainingConfig) -> ExecutionConfig:
    """How the model is computed: the fields of that name."""
    fields = dataclasses.fields(ExecutionConfig)
    return ExecutionConfig(**{field.name: getattr(training, field.name) for field in fields})


def start(config: PretrainConfig) -> None:
    """Join the process group, build the model-parallel groups, seed. Collective."""
    parallel = config.parallel
    initialize_distributed(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        timeout_seconds=60 * parallel.distributed_timeout_minutes,
    )
    seed_everything(config.training.seed)


def build_training_model(config: PretrainConfig) -> list[DistributedDataParallel]:
    """This rank's share of the model, frozen where it is not trained and wrapped for training.

    Returns:
        One chunk per virtual pipeline stage: today one.
    """
    model = build_model(
        config.model,
        config.parallel,
        execution_config(config.training),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    freeze_modules(model, config.optimizer.learning_rates)
    counts = count_parameters(model)
    for line in describe_modules(config.optimizer.learning_rates, counts):
        logger.info(line)
    transformer_config = model.config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        use_distributed_optimizer=uses_distributed_optimizer(config, model),
    )
    inner = model if config.training.precision == "fp32" else Float16Module(model.config, model)
    wrapped = DistributedDataParallel(transformer_config, ddp_config, inner)
    transformer_config.finalize_model_grads_func = finalize_model_grads
    if config.parallel.overlap_grad_reduce:
        transformer_config.no_sync_func = wrapped.no_sync
    return [wrapped]


def uses_distributed_optimizer(config: PretrainConfig, model: nn.Module) -> bool:
    """Whether the optimizer's state is spread over data-parallel ranks. Collective.

    Not if a whole pipeline stage is frozen: megatron-core's distributed optimizer cannot save the
    state of a rank that has none. Little is lost, as then only a small part of the model trains.
    """
    wanted = config.parallel.use_distributed_optimizer
    if not wanted or every_pipeline_stage_trains(model):
        return wanted
    if is_rank_0():
        logger.warning(
            "a pipeline stage is frozen as a whole: parallel.use_distributed_optimizer is off for "
            "this stage of training"
        )
    return False


def build_state(config: PretrainConfig) -> TrainState:
    """Model, optimizer, schedule and loader of a run that begins. Collective."""
    model = build_training_model(config)
    optimizer = build_optimizer(
        config.optimizer,
        model,
        bf16=config.training.precision == "bf16",
        use_distributed_optimizer=model[0].ddp_config.use_distributed_optimizer,
    )
    scheduler = build_scheduler(config.optimizer, optimizer, config.training.train_iters)
    for line in describe_optimizer(optimizer):
        logger.info(line)
    loader = agreed(lambda: make_loader(config, config.data.train, training=True))
    return TrainState(model, optimizer, scheduler, loader)


def make_loader(
    config: PretrainConfig, datasets: list[DatasetConfig], *, training: bool
) -> VLMLoader | None:
    """The loader of this rank's data-parallel replica; None on tensor-parallel ranks above 0."""
    if parallel_state.get_tensor_model_parallel_rank() > 0:
        return None
    return build_loader(
        config.data,
        datasets=datasets,
        model_config=config.model,
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        seed=config.training.seed,
        training=training,
    )


def agreed(work: Callable[[], T]) -> T:
    """Do work that can fail on one rank alone; its UserError is raised on all of them.

    What the file system refuses counts as a UserError: its words name the path.
    """
    result: T | None = None
    error: UserError | None = None
    try:
        result = work()
    except UserError as caught:
        error = caught
    except OSError as caught:
        error = UserError(str(caught))
    all_ranks_agree(error)
    return cast(T, result)


@contextlib.contextmanager
def open_run(config: PretrainConfig) -> Iterator[Run]:
    """A run that is ready to train: resumed, started from other weights, or fresh. Collective.

    `start` comes first.

    Raises:
        UserError: on all ranks: settings, data or checkpoints that do not fit.
    """
    check_rows(config)
    check_backend(config)
    num_microbatches = config.training.num_microbatches(
        parallel_state.get_data_parallel_world_size()
    )
    tokenizer = agreed(lambda: tokenizer_sha256(config.data.tokenizer))
    state = build_state(config)
    checkpointer = Checkpointer(
        config.checkpoint,
        model=dataclasses.asdict(config.model),
        tokenizer=tokenizer,
        stage=config.training.stage,
        recipe=fixed_settings(config),
        data_sets=[Path(data.path).name for data in config.data.train],
        num_loader_workers=config.data.num_workers,
    )
    restore(config, checkpointer, state)
    run = Run(
        config=config,
        state=state,
        stream=BatchStream(state.loader, get_device()),
        num_microbatches=num_microbatches,
        num_rows=config.data.visual_budget + config.data.text_budget,
        metrics=agreed(lambda: make_metrics(config, state)),
        checkpointer=checkpointer if config.checkpoint.save else None,
        validation=make_validation(config),
        ledger=agreed(lambda: make_ledger(config, state)),
    )
    describe_start(run)
    try:
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


def fixed_settings(config: PretrainConfig) -> dict[str, dict[str, float]]:
    """Settings that a resumed run must not change, and that nothing else compares.

    The schedule compares the horizon and the rates, the loader's state what shapes the samples.
    megatron-core would take the betas and eps of the checkpoint without a word.
    """
    optimizer = config.optimizer
    return {
        "training": {"global_batch_size": config.training.global_batch_size},
        "optimizer": {
            name: getattr(optimizer, name) for name in ("adam_beta1", "adam_beta2", "adam_eps")
        },
    }


def make_metrics(config: PretrainConfig, state: TrainState) -> Metrics:
    """The log of this run; on rank 0 it opens TensorBoard's file."""
    return Metrics(
        config.logging,
        train_iters=config.training.train_iters,
        first_step=state.progress.step,
        world_size=dist.get_world_size(),
        peak_flops=device_peak(config.training.precision),
    )


def make_validation(config: PretrainConfig) -> Validation | None:
    """None where no validation is asked for."""
    if config.training.eval_interval == 0:
        return None
    if not config.data.validation:
        raise ConfigError(
            f"training.eval_interval is {config.training.eval_interval}, but data.validation names "
            "no data set"
        )
    return Validation(
        lambda: agreed(lambda: make_loader(config, config.data.validation, training=False)),
        max_microbatches=config.training.eval_iters,
        num_rows=config.data.visual_budget + config.data.text_budget,
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


def check_rows(config: PretrainConfig) -> None:
    """Sequence parallelism cuts a pack's visual and text rows into equal shares each."""
    tp = config.parallel.tensor_model_parallel_size
    if not config.parallel.sequence_parallel:
        return
    for name in ("visual_budget", "text_budget"):
        rows = getattr(config.data, name)
        if rows % tp:
            raise ConfigError(
                f"data.{name} {rows} is not a multiple of parallel.tensor_model_parallel_size "
                f"{tp}, which parallel.sequence_parallel needs"
            )


def check_backend(config: PretrainConfig) -> None:
    """Refuse an attention backend that cannot run here, before a step is begun."""
    dtype = torch.float32 if config.training.precision == "fp32" else torch.bfloat16
    language = config.model.language
    select_backend(
        config.training.attention_backend,
        get_device(),
        dtype,
        language.head_dim,
        softcap=language.attn_logit_softcapping,
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
        training.precision,
        run.config.model.attention,
    )
    logger.info(
        "iterations %d to %d, global batch of up to %d samples in %d packs of %d visual + %d text "
        "rows per data-parallel rank",
        run.state.progress.step + 1,
        training.train_iters,
        training.global_batch_size,
        run.num_microbatches,
        run.config.data.visual_budget,
        run.config.data.text_budget,
    )
