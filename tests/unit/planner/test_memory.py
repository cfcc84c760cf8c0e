"""Bytes per rank against sums done by hand.

Totals are compared with what a device's allocator handed out for the 7B recipe.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dattn.config.cli import parse_command_line
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.planner.memory import PackSize, rank_memory
from megatron_dattn.planner.parameters import count_parameters
from megatron_dattn.training.run_plan import make_plan
from tests.support.planner import TINY, memory_of

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("precision", "weight", "state"), [("bf16", 2, 12), ("fp32", 4, 8)])
def test_states_cost_their_bytes(precision: str, weight: int, state: int) -> None:
    total = sum(count_parameters(TINY).values())
    memory = memory_of(execution=ExecutionConfig(precision=precision))
    assert (memory.weights, memory.gradients) == (weight * total, 4 * total)
    assert memory.optimizer == state * total


def test_distributed_optimizer_divides_its_state_alone() -> None:
    plain = memory_of(data_parallel_size=4)
    divided = memory_of(
        parallel=ParallelConfig(use_distributed_optimizer=True), data_parallel_size=4
    )
    assert divided.optimizer == plain.optimizer // 4
    assert (divided.weights, divided.gradients) == (plain.weights, plain.gradients)


def test_frozen_modules_cost_their_weights_only() -> None:
    everything, adapter_only = memory_of(), memory_of(trained=frozenset({"adapter"}))
    adapter = count_parameters(TINY)["adapter"]
    assert adapter_only.weights == everything.weights
    assert adapter_only.gradients == 4 * adapter
    assert adapter_only.optimizer == 12 * adapter
    assert adapter_only.vision < everything.vision
    # The gradient passes through the frozen language model, of whose weights there is none.
    light = memory_of(execution=ExecutionConfig(recompute="selective"))
    assert adapter_only.decoder == light.decoder < everything.decoder


def test_early_pipeline_stages_hold_more_microbatches() -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    first, last = (memory_of(parallel=parallel, pipeline_stage=stage) for stage in (0, 1))
    entering = 96 * 2 * 64
    assert first.decoder // 2 + last.decoder == memory_of().decoder + entering
    assert first.decoder // 2 > last.decoder  # whose last layer keeps less
    assert (last.vision, first.head) == (0, 0)
    alone = memory_of(parallel=parallel, num_microbatches=1)
    assert alone.decoder == first.decoder // 2


def test_the_moment_that_needs_most_decides() -> None:
    memory = memory_of()
    kept = memory.decoder + memory.vision
    moments = (kept + memory.head, kept + memory.at_work, memory.update)
    assert memory.total == memory.states + max(moments)
    assert memory.update == 4 * max(count_parameters(TINY).values())


MEASURED = json.loads((ROOT / "tests/golden/device_memory.json").read_text())["cells"]


@pytest.mark.parametrize(
    "cell", MEASURED, ids=lambda cell: f"stage{cell['stage']}-rank{cell['rank']}-{cell['flags']}"
)
def test_totals_are_what_the_allocator_hands_out(cell: dict[str, Any]) -> None:
    recipe = ROOT / "examples/mistral_7b"
    files = [f"--config={recipe / name}.yaml" for name in ("model", f"stage{cell['stage']}")]
    plan = make_plan(parse_command_line([*files, *cell["flags"].split()]).config, world_size=8)
    config, layout = plan.config, plan.layout
    ranks_per_stage = 8 // config.parallel.pipeline_model_parallel_size
    memory = rank_memory(
        config.model,
        config.parallel,
        config.execution,
        PackSize(layout.visual_budget, layout.text_budget, len(layout.images)),
        data_parallel_size=plan.data_parallel_size,
        num_microbatches=plan.num_microbatches,
        trained=plan.trained,
        pipeline_stage=cell["rank"] // ranks_per_stage,
    )
    assert memory.total == pytest.approx(cell["peak"], rel=0.05)
