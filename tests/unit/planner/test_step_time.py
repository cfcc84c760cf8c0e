"""Terms of a modelled step against sums done by hand and against counted launches."""

from pathlib import Path
from typing import Any

import pytest

from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.config.cli import parse_command_line
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.planner.flops import executed_flops
from megatron_dattn.planner.hardware import GPUS, Assumptions, Cluster
from megatron_dattn.planner.parameters import count_parameters
from megatron_dattn.planner.step_time import StepModel, StepTime
from megatron_dattn.training.run_plan import make_plan
from tests.support.planner import ALL, TINY

ROOT = Path(__file__).resolve().parents[3]
EXACT = Assumptions(1.0, 1.0, 1.0, 1.0, launch_seconds=0.0, hop_seconds=0.0)
LAYOUT = TokenLayout((8,) * 4, tuple(ImageSpan(n, 0, (4, 4)) for n in range(4)), 64, 32, (8,) * 4)
H100 = GPUS["h100"]


def model_of(
    parallel: ParallelConfig | None = None,
    execution: ExecutionConfig | None = None,
    trained: frozenset[str] = ALL,
    assumed: Assumptions = EXACT,
    **sizes: Any,
) -> StepModel:
    return StepModel(
        config=TINY,
        parallel=parallel or ParallelConfig(),
        execution=execution or ExecutionConfig(),
        layout=LAYOUT,
        trained=trained,
        data_parallel_size=sizes.get("data_parallel_size", 1),
        num_microbatches=sizes.get("num_microbatches", 4),
        cluster=Cluster(H100, assumed=assumed),
    )


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_products_and_attention_are_the_executed_operations(recompute: Any) -> None:
    time = model_of(execution=ExecutionConfig(recompute=recompute)).step()
    parts = executed_flops(TINY, [LAYOUT], recompute=recompute).parts
    in_products = sum(parts[name].total for name in ("projections", "ffn", "adapter", "head"))
    assert time.products == pytest.approx(4 * in_products / H100.bf16)
    assert time.attention == pytest.approx(4 * parts["attention"].total / H100.bf16)
    assert time.encoder > 4 * parts["vision_encoder"].total / H100.bf16  # and its norms


def test_tensor_ranks_share_products_and_pay_messages() -> None:
    """BF16, 96 tokens of width 64: a layer has 4 all-reduces, the entry 2, the head 2 of text."""
    alone = model_of().step()
    for sequence in (False, True):
        two = model_of(ParallelConfig(2, sequence_parallel=sequence)).step()
        assert two.products == pytest.approx(alone.products / 2)
        of_tokens = (4 * 4 + 2) * 96 + 2 * 32
        features = 64 * 32 * 2 / 2  # gathered once
        encoder = 2 * count_parameters(TINY)["vision_model"] * 4 / 2  # its gradients, once
        sent = 4 * (2 * of_tokens * 64 * 2 / 2 + features) + encoder
        assert two.tensor_messages == pytest.approx(sent / H100.nvlink)
    assert alone.tensor_messages == 0.0


def test_a_pipeline_fills_and_drains() -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    model = model_of(parallel)
    first, last = model.micro_batch(0), model.micro_batch(1)
    step = model.step()
    once = step.update + step.data_messages
    assert first.total > last.total
    assert step.bubble == pytest.approx(last.total)
    assert step.total == pytest.approx(4 * first.total + last.total + once)
    assert first.pipeline_messages == pytest.approx(96 * 64 * 2 / H100.nvlink)
    assert model_of(parallel, num_microbatches=8).step().bubble == step.bubble


def test_data_parallel_ranks_send_gradients_and_weights() -> None:
    parameters = sum(count_parameters(TINY).values())

    def sent(**switches: bool) -> float:
        step = model_of(ParallelConfig(**switches), data_parallel_size=4).step()
        return step.data_messages * H100.nvlink

    assert sent() == pytest.approx(2 * 4 * parameters * 3 / 4)
    assert sent(use_distributed_optimizer=True) == pytest.approx((4 + 2) * parameters * 3 / 4)
    # One bucket has nothing to hide behind.
    assert sent(overlap_grad_reduce=True) == pytest.approx(sent())
    assert model_of().step().data_messages == 0.0


def test_frozen_modules_send_and_update_nothing() -> None:
    adapter = frozenset({"adapter"})
    every, light = (model_of(trained=t, data_parallel_size=4).step() for t in (ALL, adapter))
    assert light.data_messages < every.data_messages / 10
    assert light.update < every.update / 10
    assert light.products < every.products


def test_launches_bind_where_the_device_is_faster() -> None:
    slow_host = Assumptions(launch_seconds=1.0)
    step = model_of(assumed=slow_host, num_microbatches=1).step()
    once = step.update + step.data_messages
    # 4 decoder layers, 2 encoder layers, both ends; the host is never idle.
    assert step.total - once == pytest.approx(4 * 70 + 2 * 52 + 120)
    assert model_of().step().launches == 0.0


# benchmarks/device_counts.md: kernels and matrix products of a step (without NCCL).
COUNTED = [
    (2, "--tensor-model-parallel-size 1 --sequence-parallel false", 0, 2, 5_786 + 1_792),
    (1, "--tensor-model-parallel-size 1", 0, 2, 3_169 + 990),
    (2, "--pipeline-model-parallel-size 2", 0, 8, 15_116 + 4_864),
    (2, "--pipeline-model-parallel-size 2", 1, 8, 6_743 + 2_304),
]


@pytest.mark.parametrize(("stage", "flags", "pipeline_stage", "packs", "counted"), COUNTED)
def test_launches_are_near_those_that_were_counted(
    stage: int, flags: str, pipeline_stage: int, packs: int, counted: int
) -> None:
    recipe = ROOT / "examples/mistral_7b"
    files = [f"--config={recipe / name}.yaml" for name in ("model", f"stage{stage}")]
    plan = make_plan(parse_command_line([*files, *flags.split()]).config, world_size=8)
    only_launches = Assumptions(1e9, 1e9, 1e9, 1e9, launch_seconds=1.0, hop_seconds=0.0)
    model = StepModel(
        plan.config.model,
        plan.config.parallel,
        plan.config.execution,
        plan.layout,
        plan.trained,
        plan.data_parallel_size,
        plan.num_microbatches,
        Cluster(H100, assumed=only_launches),
    )
    launched = packs * model.micro_batch(pipeline_stage).total
    assert launched == pytest.approx(counted, rel=0.1)


def test_times_add_and_scale() -> None:
    assert (StepTime(products=1.0) + StepTime(bubble=2.0)).times(3).total == 9.0
