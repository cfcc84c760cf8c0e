"""What the training loop keeps of a validation, in which order it saves, what its bar shows."""

import errno
import os
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dattn.errors import CheckpointError, UserError
from megatron_dattn.runtime.lost_ranks import LostRankError
from megatron_dattn.training.exit_reason import NumericsError
from megatron_dattn.training.trainer import (
    ProgressBar,
    ledger_failure,
    save_if_due,
    saves_finished,
    validate_if_due,
)


def run_at(step: int, recorded: list[Any]) -> Any:
    """As much of a run as a validation touches: every tenth step and the last of 25."""
    return SimpleNamespace(
        validation=SimpleNamespace(loss=lambda chunks: 0.5),
        state=SimpleNamespace(progress=SimpleNamespace(step=step), chunks=[], validation=None),
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


def run_that_saves(
    done: list[str], *, ledger_fails: bool = False, save_fails: bool = False, step: int = 10
) -> Any:
    """As much of a run as a save touches: at a step of 25, with an interval of 10."""

    def sync() -> None:
        done.append("ledger")
        if ledger_fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/logs/samples")

    def save(state: object, *, beside: bool) -> str:
        done.append("checkpoint beside training" if beside else "checkpoint")
        if save_fails:
            raise CheckpointError("disk full: /runs")
        return f"/runs/step-{step}"

    return SimpleNamespace(
        state=SimpleNamespace(progress=SimpleNamespace(step=step)),
        config=SimpleNamespace(
            training=SimpleNamespace(train_iters=25),
            checkpoint=SimpleNamespace(save_interval=10),
            logging=SimpleNamespace(sample_ledger="/logs"),
        ),
        checkpointer=SimpleNamespace(save=save, advance=lambda: done.append("advance")),
        ledger=SimpleNamespace(failure="No space left" if ledger_fails else None),
        sync_ledger=sync,
        describe_again=lambda: None,
    )


def test_the_ledger_reaches_the_disk_before_the_checkpoint() -> None:
    done: list[str] = []
    run = run_that_saves(done)
    assert ledger_failure(run) is None
    save_if_due(run)
    assert done == ["advance", "ledger", "checkpoint beside training"]


@pytest.mark.parametrize(("step", "at_once"), [(25, False), (10, True), (13, True)])
def test_the_last_save_is_waited_for(step: int, at_once: bool) -> None:
    done: list[str] = []
    save_if_due(run_that_saves(done, step=step), at_once=at_once)
    assert done == ["advance", "ledger", "checkpoint"]


def test_between_saves_one_that_is_under_way_goes_on() -> None:
    done: list[str] = []
    save_if_due(run_that_saves(done, step=13))
    assert done == ["advance"]


@pytest.mark.parametrize(
    ("error", "finished"),
    [
        (UserError("no data"), True),
        (NumericsError("no numbers", 13), True),
        (LostRankError("rank 1 does not answer"), False),
        (KeyError("a bug of one rank"), False),
    ],
)
def test_an_error_of_all_ranks_lets_a_save_end(error: Exception, finished: bool) -> None:
    done: list[str] = []
    run = SimpleNamespace(checkpointer=SimpleNamespace(finish=lambda: done.append("finish")))
    with pytest.raises(type(error)) as caught, saves_finished(run):  # type: ignore[arg-type]
        raise error
    assert caught.value is error
    assert done == ["finish"] * finished


@pytest.mark.parametrize("step", [10, 13])
def test_a_ledger_that_fails_is_an_error_with_a_saved_checkpoint(step: int) -> None:
    """At once, not only when a checkpoint is due."""
    done: list[str] = []
    run = run_that_saves(done, ledger_fails=True, step=step)
    lost = ledger_failure(run)
    with pytest.raises(UserError) as caught:
        save_if_due(run, lost=lost)
    assert str(caught.value).startswith("writing the sample ledger failed: No space left on device")
    assert f"everything up to iteration {step} is saved as /runs/step-{step}" in str(caught.value)
    assert done == ["advance", "ledger", "checkpoint"]


def test_one_full_disk_is_one_error() -> None:
    run = run_that_saves([], ledger_fails=True, save_fails=True)
    with pytest.raises(CheckpointError, match=r"sample ledger failed: .*; disk full: /runs"):
        save_if_due(run, lost=ledger_failure(run))


def test_a_ledger_that_is_whole_again_ends_nothing() -> None:
    done: list[str] = []
    save_if_due(run_that_saves(done), lost=UserError("writing the sample ledger failed"))
    assert done == ["advance", "ledger", "checkpoint"]


def test_a_ledger_without_checkpoints_ends_the_run_too() -> None:
    run = run_that_saves([], ledger_fails=True)
    run.checkpointer = None
    with pytest.raises(UserError, match="writing the sample ledger failed: No space left"):
        save_if_due(run, lost=ledger_failure(run))


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_silent_without_a_terminal(mode, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(mode, first_step=0, last_step=3) as bar:
        bar.advance(1.0)
    assert capsys.readouterr().err == ""


def test_counts_from_the_resumed_step(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("on", first_step=2, last_step=4) as bar:
        bar.advance(1.25)
        bar.advance(0.5)
    shown = capsys.readouterr().err
    assert "2/4" in shown
    assert "4/4" in shown
    assert "loss 0.5000" in shown
