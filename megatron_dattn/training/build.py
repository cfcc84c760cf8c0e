"""The parts of a run from its configuration: process groups, model, optimizer, loaders."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer.module import Float16Module
from torch import nn

from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.data.loader import ModelSizes, VLMLoader, build_loader
from megatron_dattn.data.tokenizer import tokenizer_sha256
from megatron_dattn.errors import UserError
from megatron_dattn.models.build import build_model
from megatron_dattn.runtime.agreement import all_ranks_have_same
from megatron_dattn.runtime.distributed import (
    all_ranks_agree,
    initialize_distributed,
    is_rank_0,
    join_world,
    seed_everything,
)
from megatron_dattn.runtime.os_errors import explain
from megatron_dattn.training.checkpoint import Checkpointer
from megatron_dattn.training.optimizer import (
    build_optimizer,
    build_scheduler,
    describe_optimizer,
)
from megatron_dattn.training.stages import (
    count_parameters,
    describe_modules,
    every_pipeline_stage_trains,
    freeze_modules,
)
from megatron_dattn.training.start_facts import start_facts
from megatron_dattn.training.state import TrainState

logger = logging.getLogger(__name__)

T = TypeVar("T")


def make_checkpointer(config: PretrainConfig, tokenizer: str | None = None) -> Checkpointer:
    """What saves and resumes this run, and knows what it must not be mixed up with.

    Args:
        tokenizer: sha256 of the tokenizer; read where None.

    Raises:
        ConfigError: there is no tokenizer.
    """
    return Checkpointer(
        config.checkpoint,
        model=dataclasses.asdict(config.model),
        tokenizer=tokenizer or tokenizer_sha256(config.data.tokenizer),
        stage=config.training.stage,
        recipe=fixed_settings(config),
        schedule=schedule_settings(config),
        data_sets=[Path(data.path).name for data in config.data.train],
        num_loader_workers=config.data.num_workers,
    )


def fixed_settings(config: PretrainConfig) -> dict[str, dict[str, float]]:
    """Settings that a resumed run must not change, and that nothing else compares.

    The loader's state compares what shapes the samples. megatron-core would take the betas and eps
    of the checkpoint without a word.
    """
    optimizer = config.optimizer
    return {
        "training": {"global_batch_size": config.training.global_batch_size},
        "optimizer": {
            name: getattr(optimizer, name) for name in ("adam_beta1", "adam_beta2", "adam_eps")
        },
    }


def schedule_settings(config: PretrainConfig) -> dict[str, Any]:
    """What the learning rates and the end of a stage follow from."""
    optimizer = config.optimizer
    return {
        "train_iters": config.training.train_iters,
        "learning_rates": dataclasses.asdict(optimizer.learning_rates),
        **{
            name: getattr(optimizer, name)
            for name in ("min_lr_ratio", "warmup_ratio", "weight_decay")
        },
    }


def start(config: PretrainConfig) -> None:
    """Join the process group, compare the ranks, build the model-parallel groups, seed. Collective.

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
        timeout_seconds=timeout_seconds,
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
        config.execution,
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
    inner = model if config.execution.precision == "fp32" else Float16Module(model.config, model)
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
    state = state_of(config, build_training_model(config))
    for line in describe_optimizer(state.optimizer):
        logger.info(line)
    state.loader = run_on_all_ranks(lambda: make_loader(config, config.data.train, training=True))
    return state


def state_of(
    config: PretrainConfig, model: list[DistributedDataParallel], loader: VLMLoader | None = None
) -> TrainState:
    """A model that is there, with a new optimizer and schedule. Collective."""
    optimizer = build_optimizer(
        config.optimizer,
        model,
        bf16=config.execution.precision == "bf16",
        use_distributed_optimizer=model[0].ddp_config.use_distributed_optimizer,
    )
    scheduler = build_scheduler(config.optimizer, optimizer, config.training.train_iters)
    return TrainState(model, optimizer, scheduler, loader)


def make_loader(
    config: PretrainConfig, datasets: list[DatasetConfig], *, training: bool
) -> VLMLoader | None:
    """The loader of this rank's data-parallel replica; None on tensor-parallel ranks above 0."""
    if parallel_state.get_tensor_model_parallel_rank() > 0:
        return None
    return loader_of_rank(
        config,
        datasets,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        training=training,
    )


def loader_of_rank(
    config: PretrainConfig,
    datasets: Sequence[DatasetConfig],
    data_parallel_rank: int,
    data_parallel_size: int,
    *,
    training: bool,
) -> VLMLoader:
    """The loader of one data-parallel replica; errors as of `build_loader`. Local."""
    model = config.model
    return build_loader(
        config.data,
        datasets=datasets,
        sizes=ModelSizes(model.vision.image_size, model.image_grid, model.language.vocab_size),
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
        seed=config.training.seed,
        training=training,
    )


def run_on_all_ranks(work: Callable[[], T]) -> T:
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
        error = UserError(explain(caught))
    all_ranks_agree(error)
    return cast(T, result)
