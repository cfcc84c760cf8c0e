"""The log line, what it averages, and TensorBoard."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dattn.config.training import LoggingConfig
from megatron_dattn.data.skipped_samples import LoaderCounters
from megatron_dattn.errors import ConfigError
from megatron_dattn.planner.hardware import bf16_peak, device_peak
from megatron_dattn.training.metrics import Interval, Metrics, StepReport
from megatron_dattn.training.state import Progress


def _report(step: int, loss: float = 2.0, *, skipped: bool = False) -> StepReport:
    return StepReport(
        step=step,
        loss=loss,
        grad_norm=1.5,
        skipped=skipped,
        learning_rates={"adapter": 1e-3, "language_model": 2e-5},
        samples=4,
        text_tokens=100,
        visual_tokens=300,
        flops=8e12,
        seconds=2.0,
        data_wait_seconds=0.5,
    )


def _metrics(interval: int, peak: float | None = None, **logging_options: str) -> Metrics:
    return Metrics(
        LoggingConfig(log_interval=interval, **logging_options),
        stage="stage1",
        train_iters=5,
        first_step=0,
        world_size=2,
        peak_flops=peak,
    )


def _fields(line: str) -> dict[str, str]:
    parts = [part.split(": ", 1) for part in line.split(" | ")[1:]]
    return {name.strip(): value.strip(" |") for name, value in parts}


def test_line_is_written_when_due_and_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    metrics = _metrics(2, peak=10e12)
    for step in range(1, 6):
        metrics.record(_report(step), Progress(step, consumed_samples=4 * step, skipped_samples=7))
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" | ")[0] for line in lines] == [
        "iteration 2/5",
        "iteration 4/5",
        "iteration 5/5",
    ]
    fields = _fields(lines[1])
    assert fields["consumed samples"] == "16"
    assert fields["elapsed time per iteration (ms)"] == "2000.0"
    assert fields["learning rate"] == "adapter 1.000E-03 language_model 2.000E-05"
    assert fields["lm loss"] == "2.000000E+00"
    assert fields["grad norm"] == "1.500"
    assert fields["text tokens/s"] == "50"
    assert fields["visual tokens/s"] == "150"
    assert fields["samples/s"] == "2.0"
    assert fields["data wait"] == "25.0%"
    # 8e12 operations in 2 s on 2 devices of 10e12 per second each
    assert fields["throughput per GPU (TFLOP/s/GPU)"] == "2.000"
    assert fields["MFU"] == "20.0%"
    assert fields["number of skipped samples"] == "7"


def test_problems_of_samples_are_said_once(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """On a line of their own, where they have changed since the last; TensorBoard has each."""
    caplog.set_level(logging.INFO)
    metrics = _metrics(1, tensorboard_dir=str(tmp_path))
    counts = LoaderCounters(90, {"broken_image": 2, "missing_image": 5}, {"animated_image": 3})
    for step, loaded in ((1, LoaderCounters()), (2, counts), (3, counts.copy())):
        metrics.record(
            replace(_report(step), loaded=loaded), Progress(step, fixed_problems=step - 1)
        )
    metrics.close()
    assert [line for line in caplog.messages if "lm loss" not in line] == [
        "iteration 2 | skipped samples: missing_image 5, broken_image 2 | "
        "fixed problems: animated_image 3"
    ]
    assert _fields(caplog.messages[-1])["number of fixed problems"] == "2"
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"skipped samples/missing_image" in written
    assert b"fixed problems/animated_image" in written


def test_mfu_has_no_meaning_without_a_peak(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    _metrics(1).record(_report(1), Progress(1))
    assert _fields(caplog.records[0].getMessage())["MFU"] == "n/a"
    assert device_peak("fp32") is None


def test_skipped_steps_do_not_count_in_the_loss() -> None:
    reports = [_report(1, 2.0), _report(2, math.nan, skipped=True), _report(3, 4.0)]
    assert Interval(reports, wall_seconds=6.0).loss == 3.0
    assert math.isnan(Interval(reports[1:2], wall_seconds=2.0).loss)


def test_validation_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    _metrics(1).record_validation(3, math.log(2))
    assert "validation at iteration 3" in caplog.text
    assert "PPL: 2.000000E+00" in caplog.text


WEIGHTS = [[0.1, 0.625, 0.2], [math.nan] * 3]


def test_attention_to_images_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    metrics = _metrics(2)
    metrics.record(replace(_report(1), alpha=WEIGHTS), Progress(1))
    assert caplog.messages == [
        "iteration 1 | alpha_V: layer 1 mean 0.31 (heads 0.10 to 0.62) | layer 2 sees no image"
    ]
    metrics.record(replace(_report(2, skipped=True), alpha=WEIGHTS), Progress(2))
    assert len(caplog.messages) == 2, "a skipped step gives its own line alone"


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(ConfigError, match="alpha_interval must not be negative, got -1"):
        LoggingConfig(alpha_interval=-1)


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = _metrics(1, tensorboard_dir=str(tmp_path))
    metrics.record(replace(_report(1), alpha=WEIGHTS), Progress(1))
    metrics.record_validation(1, 0.5)
    metrics.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (point,) = events.Scalars("learning rate/language_model")
    assert (point.step, point.value) == (1, pytest.approx(2e-5))
    assert events.Scalars("lm loss validation")[0].value == 0.5
    (alpha,) = events.Scalars("alpha_V/layer_01")
    assert (alpha.step, alpha.value) == (1, pytest.approx(0.925 / 3))
    for head, weight in enumerate(WEIGHTS[0], 1):
        (alpha,) = events.Scalars(f"alpha_V/layer_01/head_{head:02d}")
        assert (alpha.step, alpha.value) == (1, pytest.approx(weight))
    assert not any("layer_02" in tag for tag in events.Tags()["scalars"])
    assert {"lm loss", "grad norm", "throughput/visual_tokens per s"} <= set(
        events.Tags()["scalars"]
    )


def test_peaks_of_known_gpus() -> None:
    assert bf16_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert bf16_peak("NVIDIA H100 PCIe") == 756e12
    assert bf16_peak("NVIDIA H20") == 148e12
    assert bf16_peak("NVIDIA H200") == 989e12
    assert bf16_peak("NVIDIA GeForce GTX 1080") is None
