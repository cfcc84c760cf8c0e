"""Curves are read alike from TensorBoard and from the log that the same run wrote."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_dattn.config.training import LoggingConfig
from megatron_dattn.training.metrics import Metrics, StepReport
from megatron_dattn.training.state import Progress
from tools.plot_training import Curves, finite_points, main, read_run, smooth

STEPS = 12


def report(step: int, loss: float) -> StepReport:
    return StepReport(
        step=step,
        loss=loss / step,
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


def write_run(
    folder: Path,
    stage: str = "stage1",
    *,
    first: int = 0,
    last: int = STEPS,
    total: int = STEPS,
    loss: float = 3.0,
) -> Path:
    """Let the real `Metrics` write a run with validations at 6 and 12 and step 5 skipped."""
    config = LoggingConfig(log_interval=1, tensorboard_dir=str(folder))
    metrics = Metrics(
        config, stage=stage, train_iters=total, first_step=first, world_size=1, peak_flops=None
    )
    for step in range(first + 1, last + 1):
        metrics.record(report(step, loss), Progress(step=step))
        if step % 6 == 0:
            metrics.record_validation(step, 4.0 / step)
    metrics.close()
    return folder


def start(stage: str, first: int, total: int = STEPS) -> str:
    """What a run of a stage says when it starts (training/run.py)."""
    return (
        f"stage {stage}: 2 ranks = tensor 1 x pipeline 1 x data 2, fp32, attention dattn\n"
        f"iterations {first + 1} to {total}, global batch of up to 8 samples in 1 packs of 5 "
        "visual + 6 text tokens per data-parallel rank\n"
    )


@pytest.fixture
def write_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Callable[..., str]:
    """A run, as `write_run`, and the log of it."""

    def write(folder: str, stage: str = "stage1", *, announced: bool = True, **sizes: Any) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            write_run(tmp_path / folder, stage, **sizes)
        head = start(stage, sizes.get("first", 0), sizes.get("total", STEPS)) if announced else ""
        text = head + "".join(f"{record.getMessage()}\n" for record in caplog.records)
        return "".join(f"[2026-01-31 12:00:00] {line}\n" for line in text.splitlines())

    return write


@pytest.fixture
def run_and_log(tmp_path: Path, write_log: Callable[..., str]) -> tuple[Path, Path]:
    log = tmp_path / "stage1.log"
    log.write_text(write_log("stage1"))
    return tmp_path / "stage1", log


def only(path: Path) -> Curves:
    (curves,) = read_run(path)
    return curves


def test_log_and_events_agree(run_and_log: tuple[Path, Path]) -> None:
    """Both hold the same figures: events are float32, log lines have six decimals."""
    events, log = (only(path) for path in run_and_log)
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


def assert_two_stages(found: list[Curves]) -> None:
    first, second = found
    assert (first.name, second.name) == ("stage1", "stage2")
    assert finite_points(first.loss)[0] == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]
    assert finite_points(second.loss)[0] == [1, 2, 3, 4, 6, 7]
    assert first.loss[6] == pytest.approx(0.5)
    assert second.loss[6] == pytest.approx(0.1)
    assert second.validation.keys() == {6}
    assert max(second.learning_rates["adapter"]) == 7


def test_stages_of_one_log_are_curves_of_their_own(
    tmp_path: Path, write_log: Callable[..., str]
) -> None:
    log = tmp_path / "training.log"
    log.write_text(write_log("a") + write_log("b", "stage2", last=7, total=7, loss=0.6))
    assert_two_stages(read_run(log))


def test_stages_of_one_tensorboard_folder_are_curves_of_their_own(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "tensorboard")
    in_the_past(folder)
    write_run(folder, "stage2", last=7, total=7, loss=0.6)
    assert_two_stages(read_run(folder))


def test_a_folder_above_several_runs_shows_them_in_the_order_of_their_starts(
    tmp_path: Path,
) -> None:
    """As the demo leaves them: a run's folder beside its TensorBoard folder, and others."""
    write_run(tmp_path / "demo" / "b" / "tensorboard", loss=1.0)
    in_the_past(tmp_path / "demo" / "b" / "tensorboard")
    write_run(tmp_path / "demo" / "a" / "tensorboard", loss=2.0)
    (tmp_path / "demo" / "a" / "step-0000012").mkdir()
    found = read_run(tmp_path / "demo")
    assert [(curves.name, curves.loss[1]) for curves in found] == [("b", 1.0), ("a", 2.0)]
    assert only(tmp_path / "demo" / "a").name == "a"
    assert only(tmp_path / "demo" / "a" / "tensorboard").name == "a"


def in_the_past(folder: Path) -> None:
    """Let what stands in a folder be from an earlier second, which is in the files' names."""
    for file in folder.iterdir():
        head, time, rest = file.name.split("tfevents.")[0], *file.name.split(".", 4)[3:5]
        file.rename(file.with_name(f"{head}tfevents.{int(time) - 60}.{rest}"))


def test_pieces_of_a_log_without_the_start_of_stages(
    tmp_path: Path, write_log: Callable[..., str]
) -> None:
    log = tmp_path / "grepped.log"
    stages = write_log("a", announced=False), write_log("b", announced=False, last=7, total=7)
    log.write_text("".join(stages))
    found = read_run(log)
    assert [curves.name for curves in found] == ["12 iterations", "7 iterations"]
    assert [len(curves.loss) for curves in found] == [12, 7]


def test_a_resumed_run_counts_with_its_last_values(
    tmp_path: Path, write_log: Callable[..., str]
) -> None:
    """Resumed from step 4, stopped after step 8: what the lost part logged from 5 on is gone."""
    log, folder = tmp_path / "run.log", tmp_path / "run"
    lost = write_log("run")
    in_the_past(folder)
    log.write_text(lost + write_log("run", first=4, last=8, loss=0.9))
    for path in (log, folder):
        curves = only(path)
        assert list(finite_points(curves.loss)[0]) == [1, 2, 3, 4, 6, 7, 8]
        assert curves.loss[4] == pytest.approx(0.75)
        assert curves.loss[6] == pytest.approx(0.15)
        assert curves.validation.keys() == {6}


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
