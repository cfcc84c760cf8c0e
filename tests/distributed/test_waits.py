"""A training step asks the device for values once, whatever the number of micro-batches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.distributed import run_distributed

ONE_WAIT = ["training/forward_backward.py: sum_over_world: tolist"]

# What somebody might add to a layer, of its output [tokens, 1, H].
ADDITIONS: dict[str, Callable[[Tensor], Any]] = {
    "_local_scalar_dense": lambda hidden: hidden.sum().item(),
    "tolist": lambda hidden: hidden[0, 0].tolist(),
    "copy_": lambda hidden: torch.empty(hidden.shape).copy_(hidden.detach()),
    "cpu": lambda hidden: hidden.detach().cpu(),
    "nonzero": lambda hidden: (hidden > 0).nonzero(),
    "index": lambda hidden: hidden[hidden > 0],
    "equal": lambda hidden: torch.equal(hidden, hidden),
    "tensor(device=...)": lambda hidden: torch.tensor([1.0, 2.0], device=hidden.device),
    "to(device)": lambda hidden: torch.arange(3).to(hidden.device),
}


def _waits(settings: dict[str, Any], addition: str | None = None) -> list[str]:
    """Who waits in the second of two steps, on this rank."""
    from megatron.core.utils import unwrap_model

    from megatron_dattn.training.step import train_step
    from tests.support.training import build_run, training_config
    from tests.support.vlm import make_batch
    from tests.support.waits import Waits

    config = training_config(**settings)
    packs = [make_batch([9, 7], [(2,), ()], seed=i) for i in range(2 * settings["num_packs"])]
    run = build_run(config, packs)
    train_step(run)  # the first allocates what the optimizer keeps
    model = run.state.model
    (optimizer,) = run.state.optimizer.chained_optimizers
    kept = [value for state in optimizer.state.values() for value in state.values()]
    parameters = [*model.parameters(), *optimizer.get_parameters()]
    gradients = [p.main_grad for p in model.parameters() if p.requires_grad]
    if addition is not None:
        layer = unwrap_model(model).language_model.decoder.layers[0]
        layer.register_forward_hook(lambda _layer, _inputs, out: _add(addition, out))
    with Waits(
        value
        for value in [*kept, *parameters, *gradients, *model.module.buffers()]
        if isinstance(value, Tensor)
    ) as waits:
        train_step(run)
    return waits.found


def _add(addition: str, out: Any) -> None:
    ADDITIONS[addition](out[0] if isinstance(out, tuple) else out)


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, {"num_packs": 1}),
        (1, {"num_packs": 3, "attention": "s_attn"}),
        (2, {"num_packs": 2, "tensor": 2}),
        (2, {"num_packs": 2, "pipeline": 2}),
        (1, {"num_packs": 1, "recompute": "full", "precision": "bf16"}),
    ],
    ids=["one", "three-packs-s_attn", "tp2+sp", "pp2", "bf16-recompute"],
)
def test_a_step_waits_once(ranks: int, settings: dict[str, Any]) -> None:
    for found in run_distributed(_waits, ranks, settings):
        assert found == ONE_WAIT


def test_a_report_of_alpha_is_one_more_wait() -> None:
    (found,) = run_distributed(_waits, 1, {"num_packs": 2, "alpha_interval": 1})
    assert found == [*ONE_WAIT, "training/step.py: mean_alpha: tolist"]


@pytest.mark.parametrize("addition", list(ADDITIONS))
def test_whoever_waits_in_a_layer_is_found(addition: str) -> None:
    (found,) = run_distributed(_waits, 1, {"num_packs": 2}, addition)
    wait = f"<lambda>: {addition}"
    assert [entry.endswith(wait) for entry in found] == [True, True, False]
