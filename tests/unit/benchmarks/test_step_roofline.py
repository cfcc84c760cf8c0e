"""The step's operators against the engine's own count of operations, and bytes by hand."""

from dataclasses import replace

import pytest

from benchmarks.demo_model import demo_model, make_batch
from benchmarks.roofline import Operator, Work, total_work
from benchmarks.step_roofline import StepRun, step_operators
from megatron_dattn.attention import PRESETS
from megatron_dattn.models.execution import ExactSavings
from megatron_dattn.planner.flops import executed_flops
from megatron_dattn.planner.parameters import count_parameters

FP32, LABELLED = 4, 7
NAIVE = ExactSavings(False, False, False, False)


def run_of(preset: str = "dattn", **changes: object) -> StepRun:
    """A pack without padding."""
    model = demo_model(preset)
    layout = make_batch(model, 3).layout
    layout = replace(layout, text_budget=layout.num_text_tokens)
    return replace(StepRun(model, layout, LABELLED, FP32), **changes)


def named(run: StepRun, name: str) -> Operator:
    (found,) = (operator for operator in step_operators(run) if operator.name == name)
    return found


@pytest.mark.parametrize("savings", [ExactSavings(), NAIVE], ids=["saving", "naive"])
@pytest.mark.parametrize("preset", PRESETS)
def test_operations_are_those_that_the_engine_executes(preset: str, savings: ExactSavings) -> None:
    run = run_of(preset, savings=savings)
    forward = sum((operator.forward for operator in step_operators(run)), Work())
    executed = executed_flops(run.model, [run.layout], labelled_tokens=LABELLED, savings=savings)
    assert forward.flops == executed.forward
    # Products alike; a flash backward pass repeats the scores, which is half of their forward pass.
    backward = sum((operator.backward for operator in step_operators(run)), Work())
    scores = sum(o.forward.flops for o in step_operators(run) if o.name == "attention")
    assert backward.flops == executed.backward + scores // 2


def test_an_adam_step_moves_every_weight_by_hand() -> None:
    """fp32: a gradient zeroed, added (3), read, scaled (2), read; two moments and a weight, twice.
    BF16: the added gradient has two bytes, and so has the copy."""
    weights = sum(count_parameters(run_of().model).values())
    assert named(run_of(), "optimizer").forward.bytes == weights * 4 * (1 + 3 + 1 + 2 + 1 + 6)
    half = named(run_of(value_bytes=2), "optimizer").forward.bytes
    assert half == weights * (4 * (1 + 2 + 1 + 2 + 1 + 6) + 2 + 2)


def test_logits_are_those_of_labelled_tokens() -> None:
    vocabulary = run_of().model.language.padded_vocab_size
    head = named(run_of(), "head")
    assert head.forward.flops == 2 * LABELLED * run_of().model.language.hidden_size * vocabulary
    assert named(run_of(), "loss").forward.bytes == 4 * 2 * LABELLED * vocabulary


def test_recomputation_repeats_layers_or_what_is_no_product() -> None:
    works = [total_work(step_operators(run_of(recompute=h))) for h in ("none", "selective", "full")]
    none, selective, full = (work.flops for work in works)
    assert selective == none
    operators = step_operators(run_of())
    light = [o for o in operators if o.name in ("norm 1", "norm 2", "SwiGLU")]
    assert works[1].bytes - works[0].bytes == sum(o.forward.bytes for o in light) > 0
    around = ("patch embedding", "adapter, first", "adapter, second", "head")
    layers = sum(o.forward.flops for o in operators if o.name not in around)
    assert full - none == layers
