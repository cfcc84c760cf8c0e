"""Opens a run: its parts, checkpoints and logs; what does not fit is refused before any step."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dattn.attention import select_backend
from megatron_dattn.checkpoint.collective import on_first_rank
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.data.tokenizer import tokenizer_sha256
from megatron_dattn.errors import ConfigError
from megatron_dattn.runtime.distributed import get_device, is_rank_0
from megatron_dattn.training.build import agreed, build_state, make_loader
from megatron_dattn.training.checkpoint import Checkpointer
from megatron_dattn.training.ledger import SampleLedger
from megatron_dattn.training.metrics import Metrics
from megatron_dattn.training.optimizer import check_peak_rates
from megatron_dattn.training.peak_flops import device_peak
from megatron_dattn.training.run import Run
from megatron_dattn.training.run_folder import describe_run
from megatron_dattn.training.state import TrainState
from megatron_dattn.training.stream import BatchStream
from megatron_dattn.training.validate import Validation

logger = logging.getLogger(__name__)


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
        stage=config.training.stage,
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
