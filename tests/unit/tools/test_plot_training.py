"""Curves are read alike from TensorBoard and from the log that the same run wrote."""

import logging
import math
from pathlib import Path

import pytest
from PIL import Image

from megatron_dattn.training.config import LoggingConfig
from megatron_dattn.training.metrics import Metrics, StepReport
from megatron_dattn.training.state import Progress
from tools.plot_training import finite_points, main, read_run, smooth

STEPS = 12


def report(step: int) -> StepReport:
    return StepReport(
        step=step,
        loss=3.0 / step,
        grad_norm=1.0,
        skipped=step == 5,
        learning_rates={"adapter": 1e-3 * step / STEPS, "language_model": 2e-6},
        samples=8,
        text_tokens=100,
        visual_tokens=200,
        flops=1e9,
        seconds=0.5,
        data_wait_seconds=0.0,
    )


def write_run(folder: Path, capture: pytest.LogCaptureFixture | None = None) -> Path:
    """Let the real `Metrics` write a run of 12 steps, the 5th of them skipped."""
    config = LoggingConfig(log_interval=1, tensorboard_dir=str(folder))
    metrics = Metrics(config, train_iters=STEPS, first_step=0, world_size=1, peak_flops=None)
    for step in range(1, STEPS + 1):
        metrics.record(report(step), Progress(step=step))
        if step % 6 == 0:
            metrics.record_validation(step, 4.0 / step)
    metrics.close()
    return folder


@pytest.fixture
def run_and_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> tuple[Path, Path]:
    with caplog.at_level(logging.INFO):
        folder = write_run(tmp_path / "stage1")
    log = tmp_path / "stage1.log"
    lines = [f"[2026-01-31 12:00:00] {record.getMessage()}\n" for record in caplog.records]
    log.write_text("start\n" + "".join(lines))
    return folder, log


def test_log_and_events_agree(run_and_log: tuple[Path, Path]) -> None:
    """Both hold the same figures: events are float32, log lines have six decimals."""
    events, log = (read_run(path) for path in run_and_log)
    assert events.name == log.name == "stage1"
    assert math.isnan(events.loss[5])
    assert math.isnan(log.loss[5])
    for series in ("loss", "validation"):
        points, others = (finite_points(getattr(curves, series)) for curves in (events, log))
        assert points[0] == others[0]
        assert points[1] == pytest.approx(others[1], rel=1e-5)
    assert finite_points(events.loss)[1][0] == pytest.approx(3.0)
    assert finite_points(events.validation) == ([6, 12], pytest.approx([4 / 6, 4 / 12]))
    assert (
        events.learning_rates.keys() == log.learning_rates.keys() == {"adapter", "language_model"}
    )
    # Rates have three decimals in the log.
    for module, series in events.learning_rates.items():
        assert series == pytest.approx(log.learning_rates[module], rel=1e-3)


def test_a_resumed_run_counts_with_its_last_values(run_and_log: tuple[Path, Path]) -> None:
    _, log = run_and_log
    again = log.read_text().replace("lm loss: 3.000000E+00", "lm loss: 2.500000E+00")
    log.write_text(log.read_text() + again)
    assert read_run(log).loss[1] == 2.5
    assert len(read_run(log).loss) == STEPS


def test_smoothing_starts_at_the_first_value_and_keeps_constants() -> None:
    assert smooth([5.0, 5.0, 5.0], 0.9) == pytest.approx([5.0, 5.0, 5.0])
    assert smooth([1.0, 3.0], 0.5) == pytest.approx([1.0, (0.25 * 1 + 0.5 * 3) / 0.75])
    assert smooth([1.0, 3.0], 0.0) == [1.0, 3.0]


def test_stages_stand_side_by_side(run_and_log: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    folder, log = run_and_log
    wide, narrow = tmp_path / "out" / "wide.png", tmp_path / "narrow.png"
    assert main([str(folder), str(log), str(folder), "--output", str(wide)]) == 0
    assert f"written: {wide}" in capsys.readouterr().out
    assert main([str(folder), "--names", "only", "--output", str(narrow)]) == 0
    assert "only: 11 points, last loss 0.2500 at 12" in capsys.readouterr().out
    with Image.open(wide) as first, Image.open(narrow) as second:
        assert first.width > second.width
        # Curves were drawn: more colours than an empty pair of axes has.
        assert len(first.convert("RGB").getcolors(1 << 24)) > 50


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent"], "does not exist"),
        (["empty"], "no 'lm loss' value"),
        (["empty.log"], "no 'lm loss' value"),
        (["run", "--smoothing", "1"], "--smoothing 1.0"),
        (["run", "--names", "a", "b"], "2 names to 1 runs"),
        (["run", "--output", "picture.unknown"], "picture.unknown"),
        (["run", "--output", "empty.log/picture.png"], "cannot be written"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.log").write_text("nothing here\n")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
