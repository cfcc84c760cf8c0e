"""What the training loop keeps of a validation, and in which order it saves."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dattn.errors import CheckpointError
from megatron_dattn.training.trainer import save_if_due, validate_if_due


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


def run_that_saves(done: list[str], *, failing: bool) -> Any:
    """As much of a run as a save touches: at step 10 of 25, with an interval of 10."""

    def sync() -> None:
        done.append("ledger")
        if failing:
            raise OSError(28, "No space left on device")

    return SimpleNamespace(
        state=SimpleNamespace(progress=SimpleNamespace(step=10)),
        config=SimpleNamespace(
            training=SimpleNamespace(train_iters=25), checkpoint=SimpleNamespace(save_interval=10)
        ),
        checkpointer=SimpleNamespace(save=lambda state: done.append("checkpoint")),
        sync_ledger=sync,
    )


def test_the_ledger_reaches_the_disk_before_the_checkpoint() -> None:
    done: list[str] = []
    save_if_due(run_that_saves(done, failing=False))
    assert done == ["ledger", "checkpoint"]


def test_a_ledger_that_fails_is_an_error_with_a_saved_checkpoint() -> None:
    done: list[str] = []
    with pytest.raises(CheckpointError, match=r"sample ledger failed: .* No space left"):
        save_if_due(run_that_saves(done, failing=True))
    assert done == ["ledger", "checkpoint"]
