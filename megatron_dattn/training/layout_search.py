"""Every parallel layout of a run on so many GPUs: refused with a reason, or timed and weighed.

Each is a configuration that `make_plan` checks as it checks a run's own. What is tried: sizes of
the tensor- and pipeline-parallel groups, layers of the first and last pipeline stage, sequence
parallelism, the distributed optimizer, recomputation, and packs of fewer samples than configured
(with budgets to match). The rest, the global batch above all, stays as it is. A further parallel
axis is a field in `_layouts`, and its messages a term in `planner/step_time.py`.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.errors import ConfigError
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.planner.flops import model_flops
from megatron_dattn.planner.hardware import Cluster
from megatron_dattn.planner.memory import RESERVE_BYTES, RankMemory
from megatron_dattn.planner.parameters import rank_parameters
from megatron_dattn.planner.step_time import StepModel, StepTime
from megatron_dattn.training.run_plan import Plan, make_plan, stage_memory

MIN_TEXT_BUDGET = 1024
"""Packs are not made smaller than this for one sample's text, unless they are configured so."""
_RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
"""From the fastest to the one that takes the least memory."""
_PIPELINE_SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class PlannedLayout:
    """A layout that fits, with its modelled step."""

    plan: Plan
    memory: RankMemory
    """Of the pipeline stage that needs most."""
    time: StepTime
    cluster: Cluster

    @property
    def config(self) -> PretrainConfig:
        return self.plan.config

    @property
    def samples_per_second(self) -> float:
        return self.config.training.global_batch_size / self.time.total

    @cached_property
    def mfu(self) -> float:
        """Of the operations that the mathematics needs, the share of all GPUs' peak."""
        plan = self.plan
        flops = model_flops(self.config.model, [plan.layout], trained=plan.trained).total
        flops *= plan.data_parallel_size * plan.num_microbatches
        return flops / (self.time.total * plan.world_size * self.cluster.gpu.bf16)


@dataclass
class Refusals:
    """Layouts that cannot be, by reason: how many, and what was said of the first of them."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, message: str) -> None:
        """Count a message with all others that differ in numbers alone."""
        reason = re.sub(r"\d[\d.,]*\d|\d", "N", message)
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, message)


@dataclass(frozen=True)
class LayoutSearch:
    """What came of a search: fastest first."""

    fitting: list[PlannedLayout]
    refused: Refusals

    def distinct(self) -> list[PlannedLayout]:
        """The fastest of each tensor-, pipeline-parallel and pack size."""
        best: dict[tuple[int, ...], PlannedLayout] = {}
        for layout in self.fitting:
            parallel = layout.config.parallel
            sizes = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
            best.setdefault((*sizes, layout.config.training.micro_batch_size), layout)
        return list(best.values())


def search_layouts(
    config: PretrainConfig,
    num_gpus: int,
    cluster: Cluster,
    min_text_budget: int = MIN_TEXT_BUDGET,
) -> LayoutSearch:
    """All layouts of a run on so many GPUs.

    Raises:
        ConfigError: none fits, with the most frequent reason; or the run is context-parallel or has
            interleaved pipeline stages, whose time is not modelled.
    """
    chunks = config.parallel.virtual_pipeline_model_parallel_size
    if chunks > 1:
        raise ConfigError(
            f"parallel.virtual_pipeline_model_parallel_size {chunks}: the bubbles and messages of "
            "interleaved pipeline stages are not modelled; plan with 1"
        )
    if config.parallel.context_parallel_size > 1:
        raise ConfigError(
            f"parallel.context_parallel_size {config.parallel.context_parallel_size}: the time of "
            "context-parallel ranks is not modelled; plan with 1. --dry-run of pretrain_vlm.py "
            "tells their memory and bytes"
        )
    fitting: list[PlannedLayout] = []
    refused = Refusals()
    for ways in _ways(config, num_gpus, cluster, min_text_budget):
        for candidate in ways:
            try:
                fitting.append(_planned(candidate, num_gpus, cluster))
                break
            except ConfigError as error:
                refused.add(str(error))
    if not fitting:
        reason = max(refused.counts, key=lambda name: refused.counts[name])
        raise ConfigError(
            f"no layout on {num_gpus} {cluster.gpu.name} fits; of {sum(refused.counts.values())} "
            f"most ({refused.counts[reason]}) for this reason: {refused.first[reason]}"
        )
    fitting.sort(key=lambda layout: (layout.time.total, layout.memory.total))
    return LayoutSearch(fitting, refused)


def _planned(config: PretrainConfig, num_gpus: int, cluster: Cluster) -> PlannedLayout:
    """Raises ConfigError if the run could not start, or not fit."""
    plan = make_plan(config, num_gpus)
    stages = range(config.parallel.pipeline_model_parallel_size)
    _refuse_without_effect(plan)
    memory = max((stage_memory(plan, stage) for stage in stages), key=lambda held: held.total)
    if memory.total + RESERVE_BYTES > cluster.gpu.memory:
        raise ConfigError(
            f"a rank needs {memory.total / 1e9:.1f} GB, most of it for {memory.largest}, and "
            f"{RESERVE_BYTES / 1e9:.0f} GB to spare; a GPU has {cluster.gpu.memory / 1e9:.0f} GB"
        )
    return PlannedLayout(plan, memory, _model(plan, cluster).step(), cluster)


def _model(plan: Plan, cluster: Cluster) -> StepModel:
    config = plan.config
    return StepModel(
        config.model,
        config.parallel,
        config.execution,
        plan.layout,
        plan.trained,
        plan.data_parallel_size,
        plan.num_microbatches,
        cluster,
    )


def _refuse_without_effect(plan: Plan) -> None:
    """Refuse a distributed optimizer that training would switch off (`training/stages.py`)."""
    config = plan.config
    if not config.parallel.use_distributed_optimizer:
        return
    for stage in range(config.parallel.pipeline_model_parallel_size):
        held = rank_parameters(config.model, config.parallel, config.execution, stage)
        if not sum(count for module, count in held.items() if module in plan.trained):
            raise ConfigError(
                "parallel.use_distributed_optimizer has no effect: a pipeline stage is frozen as a "
                "whole"
            )


def _ways(
    config: PretrainConfig, num_gpus: int, cluster: Cluster, min_text_budget: int
) -> Iterator[Iterator[PretrainConfig]]:
    """For every pack, sizes, split of the layers and optimizer the ways to run, fastest first.

    Recomputation costs time and saves memory; sequence parallelism saves both where it is possible.
    So the first way that fits is the one.
    """
    for smaller in _packs(config, min_text_budget):
        for parallel in _layouts(smaller, num_gpus, cluster):
            whole = dataclasses.replace(smaller, parallel=parallel)
            yield _executions(whole)
            if parallel.pipeline_model_parallel_size > 1:
                balanced = (_balanced(way, num_gpus, cluster) for way in _executions(whole))
                yield (way for way in balanced if way is not None)


def _executions(config: PretrainConfig) -> Iterator[PretrainConfig]:
    sharded = (True, False) if config.parallel.tensor_model_parallel_size > 1 else (False,)
    for recompute, sequence in itertools.product(_RECOMPUTE, sharded):
        execution = dataclasses.replace(config.execution, recompute=recompute)
        parallel = dataclasses.replace(config.parallel, sequence_parallel=sequence)
        yield dataclasses.replace(config, parallel=parallel, execution=execution)


def _packs(config: PretrainConfig, min_text_budget: int) -> Iterator[PretrainConfig]:
    """Packs of as many samples as configured, and of a half, a quarter ... down to one."""
    training, data = config.training, config.data
    yield config
    samples = training.micro_batch_size
    least_text = min(min_text_budget, data.text_budget)
    while samples > 1 and samples % 2 == 0:
        samples //= 2
        share = samples / training.micro_batch_size
        text = max(_aligned(data.text_budget, share), least_text)
        yield dataclasses.replace(
            config,
            training=dataclasses.replace(training, micro_batch_size=samples),
            data=dataclasses.replace(
                data, visual_budget=_aligned(data.visual_budget, share), text_budget=text
            ),
        )


def _aligned(budget: int, share: float) -> int:
    """A share of a budget, a multiple of what the whole is one of: of 128 at most."""
    multiple = math.gcd(budget, 128)
    return math.ceil(budget * share / multiple) * multiple


def _layouts(config: PretrainConfig, num_gpus: int, cluster: Cluster) -> Iterator[ParallelConfig]:
    tensor_sizes = [size for size in (1, 2, 4, 8) if size <= cluster.gpus_per_node]
    for tensor, pipeline, distributed in itertools.product(
        tensor_sizes, _PIPELINE_SIZES, (True, False)
    ):
        replicas = num_gpus // (tensor * pipeline)
        if replicas == 0 or (distributed and replicas == 1):
            continue
        yield dataclasses.replace(
            config.parallel,
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            num_layers_in_first_pipeline_stage=None,
            num_layers_in_last_pipeline_stage=None,
            sequence_parallel=False,
            use_distributed_optimizer=distributed,
            # The gradients of an adapter alone are not worth it.
            overlap_grad_reduce=replicas > 1 and config.optimizer.learning_rates.language_model > 0,
        )


def _balanced(config: PretrainConfig, num_gpus: int, cluster: Cluster) -> PretrainConfig | None:
    """The layers shared out so that the slowest pipeline stage is fastest; None if equally."""
    stages = config.parallel.pipeline_model_parallel_size
    num_layers = config.model.language.num_hidden_layers
    if stages == 1 or num_layers < stages:
        return None
    whole = dataclasses.replace(config.parallel, pipeline_model_parallel_size=1)
    alone = dataclasses.replace(config, parallel=whole)
    try:
        model = _model(make_plan(alone, num_gpus // stages), cluster)
    except ConfigError:
        return None  # as the layout itself is refused
    layer = model.decoder_layers(0, num_layers).settled.total / num_layers
    before = model.entry().settled.total / layer
    behind = model.head().settled.total / layer
    best: tuple[float, int, int] | None = None
    for middle in range(1, num_layers):
        ends = num_layers - (stages - 2) * middle
        for first in range(1, ends):
            longest = max(first + before, middle if stages > 2 else 0, ends - first + behind)
            if best is None or longest < best[0]:
                best = (longest, first, ends - first)
    if best is None or best[1] * stages == best[2] * stages == num_layers:
        return None
    parallel = dataclasses.replace(
        config.parallel,
        num_layers_in_first_pipeline_stage=best[1],
        num_layers_in_last_pipeline_stage=best[2],
    )
    return dataclasses.replace(config, parallel=parallel)
