"""The search over layouts: what is tried, why something is refused, and what wins."""

import dataclasses

import pytest

from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.config.training import ModuleLearningRates, OptimizerConfig, TrainingConfig
from megatron_dattn.data.config import DataConfig
from megatron_dattn.errors import ConfigError
from megatron_dattn.planner.hardware import GPUS, Cluster, Gpu
from megatron_dattn.planner.memory import RESERVE_BYTES
from megatron_dattn.training.layout_search import Refusals, search_layouts
from megatron_dattn.training.run_plan import make_plan, stage_memory
from tests.support.vlm import even_model_config

H100 = Cluster(GPUS["h100"])
EVERYTHING = OptimizerConfig(ModuleLearningRates(1e-5, 1e-5, 1e-5))
# Four heads and two key heads, four layers.
TINY = PretrainConfig(
    model=even_model_config(),
    data=DataConfig(visual_budget=64, text_budget=32),
    optimizer=EVERYTHING,
    training=TrainingConfig(micro_batch_size=4, global_batch_size=32),
)


def with_memory(num_bytes: float) -> Cluster:
    return Cluster(dataclasses.replace(GPUS["h100"], memory=num_bytes))


def test_every_layout_is_refused_or_planned_and_the_fastest_is_first() -> None:
    search = search_layouts(TINY, 4, H100)
    times = [layout.time.total for layout in search.fitting]
    assert times == sorted(times)
    for layout in search.fitting:
        parallel, training = layout.config.parallel, layout.config.training
        replicas = layout.plan.data_parallel_size
        assert parallel.model_parallel_size * replicas == 4
        assert training.global_batch_size == 32  # and the learning it stands for
        assert training.micro_batch_size * replicas * layout.plan.num_microbatches == 32
        assert layout.memory.total + RESERVE_BYTES <= GPUS["h100"].memory
    sizes = {layout.config.parallel.tensor_model_parallel_size for layout in search.fitting}
    assert sizes == {1, 2}
    (heads,) = (said for said in search.refused.first.values() if "num_key_value_heads" in said)
    assert "tensor_model_parallel_size 4" in heads


def test_context_parallel_runs_are_refused_as_their_time_is_not_modelled() -> None:
    parallel = dataclasses.replace(TINY.parallel, context_parallel_size=2)
    with pytest.raises(ConfigError, match=r"context_parallel_size 2: the time .* is not modelled"):
        search_layouts(dataclasses.replace(TINY, parallel=parallel), 4, H100)


def test_interleaved_stages_are_refused_as_their_time_is_not_modelled() -> None:
    sizes = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    parallel = dataclasses.replace(TINY.parallel, **sizes)
    with pytest.raises(ConfigError, match=r"virtual_pipeline_model_parallel_size 2: .* modelled"):
        search_layouts(dataclasses.replace(TINY, parallel=parallel), 4, H100)


def test_distinct_layouts_differ_in_sizes() -> None:
    search = search_layouts(TINY, 4, H100)
    sizes = [
        (
            layout.config.parallel.tensor_model_parallel_size,
            layout.config.parallel.pipeline_model_parallel_size,
            layout.config.training.micro_batch_size,
        )
        for layout in search.distinct()
    ]
    assert len(sizes) == len(set(sizes)) > 4
    assert search.distinct()[0] is search.fitting[0]


def test_smaller_packs_keep_their_alignment_and_a_sample_of_text() -> None:
    config = dataclasses.replace(TINY, data=DataConfig(visual_budget=96, text_budget=32))

    def budgets(min_text_budget: int) -> dict[int, tuple[int, int]]:
        fitting = search_layouts(config, 4, H100, min_text_budget).fitting
        return {
            layout.config.training.micro_batch_size: (
                layout.config.data.visual_budget,
                layout.config.data.text_budget,
            )
            for layout in fitting
        }

    # Multiples of 32, as the whole budgets are.
    assert budgets(1) == {4: (96, 32), 2: (64, 32), 1: (32, 32)}
    assert budgets(1024) == {4: (96, 32), 2: (64, 32), 1: (32, 32)}


def test_memory_is_a_reason_and_names_what_it_is_for() -> None:
    fullest = max(stage_memory(make_plan(TINY, 1), 0).total, 1)
    enough = search_layouts(TINY, 1, with_memory(fullest + RESERVE_BYTES)).fitting
    assert enough
    with pytest.raises(ConfigError, match=r"no layout on 1 h100 fits.* GB, most of it for"):
        search_layouts(TINY, 1, with_memory(RESERVE_BYTES))


def test_a_frozen_pipeline_stage_has_no_distributed_optimizer() -> None:
    adapter = dataclasses.replace(TINY, optimizer=OptimizerConfig())
    search = search_layouts(adapter, 4, H100)
    assert any("frozen as a whole" in said for said in search.refused.first.values())
    for layout in search.fitting:
        parallel = layout.config.parallel
        if parallel.pipeline_model_parallel_size > 1:
            assert not parallel.use_distributed_optimizer
        assert not parallel.overlap_grad_reduce


def test_layers_are_shared_out_by_their_time() -> None:
    """A deep encoder takes layers from the first pipeline stage."""
    vision = dataclasses.replace(TINY.model.vision, num_hidden_layers=24)
    language = dataclasses.replace(TINY.model.language, num_hidden_layers=12)
    model = dataclasses.replace(TINY.model, vision=vision, language=language)
    search = search_layouts(dataclasses.replace(TINY, model=model), 2, H100)
    two = [x for x in search.fitting if x.config.parallel.pipeline_model_parallel_size == 2]
    (first, last) = two[0].config.parallel.layers_per_pipeline_stage(12)
    assert first < last
    even = [x for x in two if x.config.parallel.num_layers_in_first_pipeline_stage is None]
    assert even
    assert two[0].time.total < even[0].time.total


def test_layers_that_do_not_divide_are_shared_out_unequally() -> None:
    language = dataclasses.replace(TINY.model.language, num_hidden_layers=5)
    model = dataclasses.replace(TINY.model, language=language)
    search = search_layouts(dataclasses.replace(TINY, model=model), 4, H100)
    four = [x for x in search.fitting if x.config.parallel.pipeline_model_parallel_size == 4]
    assert four
    assert all(sum(x.config.parallel.layers_per_pipeline_stage(5)) == 5 for x in four)
    assert any("does not divide" in said for said in search.refused.first.values())


def test_a_narrow_network_prefers_smaller_data_parallel_groups() -> None:
    """The cost of a wide one is seen: otherwise the same cluster."""

    def best(network: float) -> float:
        gpu: Gpu = dataclasses.replace(GPUS["h100"], network=network)
        return search_layouts(TINY, 16, Cluster(gpu)).fitting[0].time.total

    assert best(50e9) < best(1e6)


def test_refusals_are_counted_by_reason() -> None:
    refused = Refusals()
    for message in ("a 2 is not a 3.5", "a 1,024 is not a 7", "other"):
        refused.add(message)
    assert refused.counts == {"a N is not a N": 2, "other": 1}
    assert refused.first["a N is not a N"] == "a 2 is not a 3.5"
