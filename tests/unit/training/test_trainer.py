"""What the training loop keeps of a validation."""

from types import SimpleNamespace
from typing import Any

from megatron_dattn.training.trainer import validate_if_due


def run_at(step: int, recorded: list[Any]) -> Any:
    """As much of a run as a validation touches: every tenth step and the last of 25."""
    return SimpleNamespace(
        validation=SimpleNamespace(loss=lambda model: 0.5),
        state=SimpleNamespace(progress=SimpleNamespace(step=step), model=[], validation=None),
        config=SimpleNamespace(training=SimpleNamespace(eval_interval=10, train_iters=25)),
        metrics=SimpleNamespace(record_validation=lambda *values: recorded.append(values)),
    )


def test_the_last_validation_goes_into_the_state() -> None:
    recorded: list[Any] = []
    for step in (10, 25):
        run = run_at(step, recorded)
        validate_if_due(run)
        assert run.state.validation == {"step": step, "loss": 0.5}
    between = run_at(11, recorded)
    validate_if_due(between)
    assert between.state.validation is None
    assert recorded == [(10, 0.5), (25, 0.5)]
