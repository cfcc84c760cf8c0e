"""megatron-core's own GPTModel trains through the CPU runtime under every parallel layout.

The reference is a plain PyTorch loop on one process: no DDP, no schedule, torch's clipping and
AdamW. What is shown for megatron-core's model holds for ours, which uses the same engine.
"""

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

from megatron_dattn.checkpoint import save_checkpoint
from tests.support.distributed import run_distributed
from tests.support.gpt import Layout, Steps, build_engine, train, train_plainly
from tests.support.megatron import init_model_parallel

STEPS = 3
# FP32 sums in another order differ in the last of 24 bits; three steps with a rate of 1e-2 carry
# that to a few 1e-7 in losses of size 4 and gradient norms of size 1.
FP32_TOLERANCE = {"rtol": 2e-6, "atol": 0.0}
# A TP2 row-parallel product rounds its two halves to BF16's 8 bits before their sum.
BF16_TOLERANCE = {"rtol": 2e-2, "atol": 0.0}

LAYOUTS = {
    "one-process": (1, Layout()),
    "one-process-distributed-optimizer": (1, Layout(distributed_optimizer=True)),
    "tp2": (2, Layout(tensor_parallel=2)),
    "tp2-sp": (2, Layout(tensor_parallel=2, sequence_parallel=True)),
    "pp2": (2, Layout(pipeline_parallel=2)),
    "dp2": (2, Layout()),
    "dp2-overlap": (2, Layout(overlap=True)),
    "dp2-distributed-optimizer": (2, Layout(distributed_optimizer=True)),
    "dp2-distributed-optimizer-overlap": (2, Layout(distributed_optimizer=True, overlap=True)),
    "tp2-sp-pp2-recompute": (
        4,
        Layout(tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True, recompute=True),
    ),
}


@pytest.fixture(scope="module")
def plain_steps() -> Steps:
    return run_distributed(train_plainly, 1, STEPS)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_like_plain_pytorch(name: str, plain_steps: Steps) -> None:
    world_size, layout = LAYOUTS[name]
    ranks = run_distributed(train, world_size, layout, STEPS)
    for steps in ranks:
        assert steps == ranks[0]
    torch.testing.assert_close(torch.tensor(ranks[0]), torch.tensor(plain_steps), **FP32_TOLERANCE)


def test_bf16_layouts_agree(plain_steps: Steps) -> None:
    one = run_distributed(train, 1, Layout(bf16=True), STEPS)[0]
    distributed = Layout(bf16=True, distributed_optimizer=True, overlap=True)
    # Two micro-batches on each of two ranks: the FP32 gradient buffer sums the same four numbers,
    # in pairs instead of one after the other.
    two = run_distributed(train, 2, distributed, STEPS)[0]
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), **BF16_TOLERANCE)
    sharded = Layout(
        tensor_parallel=2, sequence_parallel=True, bf16=True, distributed_optimizer=True
    )
    torch.testing.assert_close(
        torch.tensor(run_distributed(train, 2, sharded, STEPS)[0]),
        torch.tensor(one),
        **BF16_TOLERANCE,
    )
    torch.testing.assert_close(torch.tensor(one), torch.tensor(plain_steps), **BF16_TOLERANCE)
    assert one != plain_steps  # it did round


def test_recomputation_replays_dropout() -> None:
    kept = run_distributed(train, 1, Layout(dropout=0.2), STEPS)[0]
    recomputed = run_distributed(train, 1, Layout(dropout=0.2, recompute=True), STEPS)[0]
    assert recomputed == kept
    assert kept != run_distributed(train, 1, Layout(), STEPS)[0]


def draw_random_numbers() -> tuple[list[float], list[float], list[float], int]:
    """Inside, outside, and again inside the model-parallel region."""
    init_model_parallel(tensor_parallel=2, seed=7)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    with tracker.fork():
        first = torch.rand(3).tolist()
    outside = torch.rand(3).tolist()
    with tracker.fork():
        second = torch.rand(3).tolist()
    return first, outside, second, parallel_state.get_tensor_model_parallel_rank()


def test_random_states_differ_inside_and_agree_outside_model_parallel_regions() -> None:
    (first, outside, second, _), (other_first, other_outside, _, _) = run_distributed(
        draw_random_numbers, 2
    )
    assert outside == other_outside
    assert first != other_first
    assert len({*first, *outside, *second}) == 9


def save_and_go_on(folder: str, layout: Layout) -> Steps:
    init_model_parallel(layout.tensor_parallel, layout.pipeline_parallel)
    engine = build_engine(layout)
    for step in range(2):
        engine.train_step(step)
    save_checkpoint(folder, 1, engine.sharded_state_dict(), facts={})
    return [engine.train_step(step) for step in range(2, 5)]


def load_and_go_on(folder: str, layout: Layout) -> tuple[Steps, list[int]]:
    init_model_parallel(layout.tensor_parallel, layout.pipeline_parallel)
    engine = build_engine(layout)
    path = str(Path(folder) / "step-0000001")
    state = dist_checkpointing.load(engine.sharded_state_dict(is_loading=True), path)
    engine.load_state_dict(state)
    steps = [engine.train_step(step) for step in range(2, 5)]
    groups = [g for o in engine.optimizer.chained_optimizers for g in o.optimizer.param_groups]
    return steps, [group["step"] for group in groups]


def test_distributed_optimizer_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    layout = Layout(distributed_optimizer=True)
    expected = run_distributed(save_and_go_on, 2, str(tmp_path), layout)[0]
    for steps, counts in run_distributed(load_and_go_on, 2, str(tmp_path), layout):
        assert steps == expected
        # torch's AdamW would share one step count among all parameters and count to 2 + 3 * n.
        assert set(counts) == {5}
    other = Layout(tensor_parallel=2, sequence_parallel=True, distributed_optimizer=True)
    steps, _ = run_distributed(load_and_go_on, 2, str(tmp_path), other)[0]
    torch.testing.assert_close(torch.tensor(steps), torch.tensor(expected), **FP32_TOLERANCE)
