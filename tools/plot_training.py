"""Draw the loss curves of one run, or of several stages side by side, as one picture.

    python tools/plot_training.py runs/stage1 runs/stage2 runs/stage3 --output loss.png

A run is a TensorBoard folder (`logging.tensorboard_dir`) or a log file. Above: the loss as logged
and smoothed, and the validation loss. Below: the learning rate of every trained module. A step that
was logged twice (a run resumed from an older checkpoint) counts with its last value.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from megatron_dattn.errors import EXIT_USER_ERROR, UserError

# The tags that megatron_dattn/training/metrics.py writes.
LOSS_TAG = "lm loss"
VALIDATION_TAG = "lm loss validation"
RATE_PREFIX = "learning rate/"

_NUMBER = r"([-+.\w]+)"
_ITERATION = re.compile(rf"\biteration +(\d+)/ *\d+ \|.*\| lm loss: {_NUMBER} \|")
_RATES = re.compile(r"\| learning rate: ([^|]*) \|")
_VALIDATION = re.compile(rf"\bvalidation at iteration (\d+) \| lm loss value: {_NUMBER} \|")

Series = dict[int, float]  # value by step


@dataclass
class Curves:
    """What is drawn of one run."""

    name: str
    loss: Series = field(default_factory=dict)
    validation: Series = field(default_factory=dict)
    learning_rates: dict[str, Series] = field(default_factory=dict)
    """By module."""


def read_run(path: Path) -> Curves:
    """The curves of a TensorBoard folder or a log file.

    Raises:
        UserError: the path does not exist or holds no training loss.
    """
    if path.is_dir():
        curves = _read_events(path)
    elif path.is_file():
        curves = _read_log(path)
    else:
        raise UserError(f"'{path}' does not exist; give a TensorBoard folder or a log file")
    if not any(math.isfinite(value) for value in curves.loss.values()):
        raise UserError(
            f"'{path}' holds no '{LOSS_TAG}' value; give the run's logging.tensorboard_dir or its "
            "log file"
        )
    return curves


def _read_events(folder: Path) -> Curves:
    # Imported here: reading a log file should not need tensorboard.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0 keeps every point instead of a sample of them.
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()

    def series(tag: str) -> Series:
        return {event.step: float(event.value) for event in events.Scalars(tag)}

    tags = events.Tags()["scalars"]
    return Curves(
        name=folder.name,
        loss=series(LOSS_TAG) if LOSS_TAG in tags else {},
        validation=series(VALIDATION_TAG) if VALIDATION_TAG in tags else {},
        learning_rates={
            tag.removeprefix(RATE_PREFIX): series(tag)
            for tag in tags
            if tag.startswith(RATE_PREFIX)
        },
    )


def _read_log(path: Path) -> Curves:
    curves = Curves(name=path.stem)
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            _read_line(line, curves)
    return curves


def _read_line(line: str, curves: Curves) -> None:
    if found := _VALIDATION.search(line):
        curves.validation[int(found[1])] = float(found[2])
    elif found := _ITERATION.search(line):
        step = int(found[1])
        curves.loss[step] = float(found[2])
        rates = _RATES.search(line)
        words = rates[1].split() if rates else []
        for module, rate in zip(words[::2], words[1::2], strict=True):
            curves.learning_rates.setdefault(module, {})[step] = float(rate)


def finite_points(series: Series) -> tuple[list[int], list[float]]:
    """Steps in order and their values, without NaN and infinity (skipped steps)."""
    points = [(step, series[step]) for step in sorted(series) if math.isfinite(series[step])]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: Iterable[float], factor: float) -> list[float]:
    """Exponential moving average, corrected for its start: the first value is the first value."""
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average = factor * average + (1 - factor) * value
        weight = factor * weight + (1 - factor)
        smoothed.append(average / weight)
    return smoothed


def draw(runs: list[Curves], output: Path, *, smoothing: float, title: str | None) -> None:
    """Write the picture; its format follows from the file's suffix.

    Raises:
        UserError: the picture cannot be written.
    """
    figure, axes = plt.subplots(
        2,
        len(runs),
        figsize=(max(6.0, 4.2 * len(runs)), 5.6),
        height_ratios=(3, 1),
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    for column, curves in enumerate(runs):
        _draw_losses(axes[0][column], curves, smoothing)
        _draw_rates(axes[1][column], curves)
    axes[0][0].set_ylabel("loss per labelled token")
    axes[1][0].set_ylabel("learning rate")
    if title:
        figure.suptitle(title)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(f"'{output}' cannot be written: {error}") from error
    finally:
        plt.close(figure)


def _draw_losses(axes: Axes, curves: Curves, smoothing: float) -> None:
    steps, losses = finite_points(curves.loss)
    axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=0.8, label="training")
    axes.plot(steps, smooth(losses, smoothing), color="C0", linewidth=1.6, label="smoothed")
    steps, losses = finite_points(curves.validation)
    if steps:
        axes.plot(steps, losses, "o-", color="C3", markersize=4, linewidth=1, label="validation")
    axes.set_title(curves.name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _draw_rates(axes: Axes, curves: Curves) -> None:
    for module, series in sorted(curves.learning_rates.items()):
        steps, rates = finite_points({step: rate for step, rate in series.items() if rate > 0})
        axes.plot(steps, rates, linewidth=1.2, label=module)
    if curves.learning_rates:
        axes.set_yscale("log")  # modules train at rates that differ by powers of ten
        axes.legend(fontsize="x-small")
    axes.grid(alpha=0.3)
    axes.set_xlabel("iteration")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="TensorBoard folders or log files")
    parser.add_argument("--output", type=Path, default=Path("loss.png"), help="picture to write")
    parser.add_argument("--names", nargs="+", help="titles of the runs, by default their paths'")
    parser.add_argument("--title", help="title of the picture")
    parser.add_argument(
        "--smoothing", type=float, default=0.9, help="weight of the past, from 0 to below 1"
    )
    return parser.parse_args(arguments)


def plot(arguments: argparse.Namespace) -> None:
    """Read the runs and draw them.

    Raises:
        UserError: an argument or a run cannot be used.
    """
    if not 0 <= arguments.smoothing < 1:
        raise UserError(f"--smoothing {arguments.smoothing} must be at least 0 and below 1")
    if arguments.names and len(arguments.names) != len(arguments.runs):
        raise UserError(f"--names gives {len(arguments.names)} names to {len(arguments.runs)} runs")
    runs = [read_run(path) for path in arguments.runs]
    for curves, name in zip(runs, arguments.names or [], strict=False):
        curves.name = name
    draw(runs, arguments.output, smoothing=arguments.smoothing, title=arguments.title)
    for curves in runs:
        steps, losses = finite_points(curves.loss)
        print(f"{curves.name}: {len(steps)} points, last loss {losses[-1]:.4f} at {steps[-1]}")
    print(f"written: {arguments.output}")


def main(arguments: list[str] | None = None) -> int:
    try:
        plot(parse_arguments(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
