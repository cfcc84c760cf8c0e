"""Runs of the real training step on a tiny model and ready-made packs, without files.

Every layout sees the same weights and the same samples, so losses, gradient norms and weights can
be compared between layouts. Collect them with `run_distributed`.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from megatron_dattn.batch import PackedBatch
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.config.training import (
    LoggingConfig,
    ModuleLearningRates,
    OptimizerConfig,
    TrainingConfig,
)
from megatron_dattn.data.config import DataConfig
from megatron_dattn.data.skipped_samples import LoaderCounters
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.parallel.batch import is_loading_rank
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.runtime.distributed import get_device, seed_everything
from megatron_dattn.training.metrics import Metrics
from megatron_dattn.training.run import Run, build_state, join_ranks
from megatron_dattn.training.stages import build_training_model
from megatron_dattn.training.stream import BatchStream
from tests.support.megatron import global_parameters
from tests.support.vlm import VISION, fill_parameters, join_shards, partition_of, tiny_model_config

ALL_RATES = ModuleLearningRates(vision_model=1e-3, adapter=2e-3, language_model=5e-4)


class PackLoader:
    """A loader over ready-made packs; each data-parallel rank takes its share of every step."""

    def __init__(self, packs: Sequence[PackedBatch], replica: int = 0) -> None:
        self._packs = list(packs)
        self._replica = replica
        self._next = 0

    def go_to(self, place: int) -> None:
        """Give the pack at that place next."""
        self._next = place

    def __iter__(self) -> Iterator[PackedBatch]:
        while self._next < len(self._packs):
            self._next += 1
            yield self._packs[self._next - 1]

    def counters(self) -> LoaderCounters:
        return LoaderCounters(seen=self._next)

    def save_state(self) -> bytes:
        return json.dumps({"replica": self._replica, "next": self._next}).encode()

    def restore_state(self, state: bytes) -> None:
        saved = json.loads(state)
        assert saved["replica"] == self._replica, "the state of another data-parallel rank"
        self._next = saved["next"]


def training_config(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    rates: ModuleLearningRates = ALL_RATES,
    train_iters: int = 4,
    num_packs: int = 1,
    attention: str = "dattn",
    **changes: object,
) -> PretrainConfig:
    """Settings of a tiny fp32 run; `num_packs` packs of one sample each make a global batch.

    Keyword arguments named like a field of a section change it.
    """
    config = PretrainConfig(
        model=tiny_model_config(attention),
        parallel=ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            sequence_parallel=tensor > 1,
            distributed_timeout_minutes=1.0,
        ),
        data=DataConfig(visual_budget=36, text_budget=32),
        optimizer=OptimizerConfig(learning_rates=rates, warmup_ratio=0.0),
        training=TrainingConfig(
            train_iters=train_iters,
            micro_batch_size=1,
            global_batch_size=num_packs,
        ),
        execution=ExecutionConfig(precision="fp32", attention_backend="math"),
        logging=LoggingConfig(log_interval=1, progress_bar="off"),
    )
    for name, value in changes.items():
        config = _with(config, name, value)
    return config


def fp8_training_config(tensor: int, preset: str, **changes: Any) -> PretrainConfig:
    """A tiny run whose widths and numbers of tokens FP8 takes on one or two ranks."""
    vision = dataclasses.replace(VISION, patch_size=11)
    model = tiny_model_config(preset, vision=vision, hidden_size=64, intermediate_size=96)
    data = {"visual_budget": 48, "text_budget": 32}
    config = training_config(tensor=tensor, attention=preset, **{**data, **changes})
    return dataclasses.replace(config, model=model)


def _with(config: PretrainConfig, name: str, value: object) -> PretrainConfig:
    for section in (
        "parallel",
        "execution",
        "data",
        "optimizer",
        "training",
        "checkpoint",
        "logging",
    ):
        settings = getattr(config, section)
        if hasattr(settings, name):
            changed = dataclasses.replace(settings, **{name: value})
            return dataclasses.replace(config, **{section: changed})
    raise AssertionError(f"no section has a field {name}")


def build_run(config: PretrainConfig, packs: Sequence[PackedBatch]) -> Run:
    """A run on this rank over the global list of packs, step after step."""
    join_ranks(config)
    seed_everything(config.training.seed)
    chunks = build_training_model(config)
    for number, chunk in enumerate(chunks):
        fill_parameters(unwrap_model(chunk), _layer_offset(config, number))
    replicas = parallel_state.get_data_parallel_world_size()
    loader: Any = None  # it acts as a VLMLoader
    if is_loading_rank():
        replica = parallel_state.get_data_parallel_rank()
        loader = PackLoader(packs[replica::replicas], replica)
    state = build_state(config, chunks, loader)
    state.optimizer.reload_model_params()
    return Run(
        config=config,
        state=state,
        stream=BatchStream(loader, get_device()),
        metrics=Metrics(
            config.logging,
            stage=config.training.stage,
            train_iters=config.training.train_iters,
            first_step=0,
            world_size=torch.distributed.get_world_size(),
            peak_flops=None,
        ),
    )


def _layer_offset(config: PretrainConfig, chunk: int) -> int:
    """Decoder layers before those of this pipeline rank's chunk."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    parallel, layers = config.parallel, config.model.language.num_hidden_layers
    chunks = parallel.virtual_pipeline_model_parallel_size
    sizes = [here // chunks for here in parallel.layers_per_pipeline_stage(layers)]
    return chunk * sum(sizes) + sum(sizes[:stage])


Shard = tuple[torch.Tensor, int | None, int]
"""Values, partition axis, stride."""


def local_weights(run: Run, *, gradients: bool = False) -> dict[str, Shard]:
    """This rank's weights under names of the whole model; or the reduced gradients of those that
    are trained."""
    return {
        name: (
            getattr(parameter, "main_grad" if gradients else "data").detach().clone(),
            *partition_of(parameter),
        )
        for number, chunk in enumerate(run.state.chunks)
        for name, parameter in global_parameters(
            unwrap_model(chunk), _layer_offset(run.config, number)
        )
        if parameter.requires_grad or not gradients
    }


def whole_weights(run: Run) -> dict[str, torch.Tensor]:
    """The model's weights, joined over the tensor- and pipeline-parallel ranks, on every rank.

    Collective. Replicated weights must be equal bit for bit.
    """
    return whole_tensors(local_weights(run))


def whole_tensors(local: dict[str, Shard]) -> dict[str, torch.Tensor]:
    """Join shards as `whole_weights` does. Collective over the model-parallel group."""
    group = parallel_state.get_model_parallel_group()
    gathered: list[dict[str, Shard]] = [{} for _ in range(group.size())]
    torch.distributed.all_gather_object(gathered, local, group=group)
    shards: dict[str, list[Shard]] = {}
    for tensors in gathered:
        for name, shard in tensors.items():
            shards.setdefault(name, []).append(shard)
    return {
        name: join_shards([tensor for tensor, _, _ in parts], parts[0][1], parts[0][2])
        for name, parts in shards.items()
    }


def leave() -> None:
    """Forget the model-parallel groups, for the next run in the same process."""
    parallel_state.destroy_model_parallel()
