"""Draw the loss curves of one run, or of several stages side by side, as one picture.

    python tools/plot_training.py runs/demo-dattn/stage1 runs/demo-dattn/stage2 --output loss.png
    python tools/plot_training.py runs/demo-dattn --output loss.png
    python tools/plot_training.py training.log --output loss.png

A run is a log file or a TensorBoard folder (`logging.tensorboard_dir`), or a folder above such
folders. Each stage in it gets a column of its own: above, the loss as logged and smoothed, and the
validation loss; below, the learning rate of every trained module. What a stage logged after the
step from which it was resumed counts no more.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dattn.errors import UserError
from megatron_dattn.runtime.os_errors import explain
from megatron_dattn.runtime.tool import ToolParser, run_tool

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# The tags that megatron_dattn/training/metrics.py writes.
LOSS_TAG = "lm loss"
VALIDATION_TAG = "lm loss validation"
RATE_PREFIX = "learning rate/"
STAGE_TAG = "stage/text_summary"

_NUMBER = r"([-+.\w]+)"
_ITERATION = re.compile(rf"\biteration +(\d+)/ *(\d+) \|.*\| lm loss: {_NUMBER} \|")
_STAGE = re.compile(r"\bstage (.+): \d+ ranks = tensor ")
_FIRST_STEP = re.compile(r"\biterations (\d+) to \d+, global batch of ")
_RATES = re.compile(r"\| learning rate: ([^|]*) \|")
_VALIDATION = re.compile(rf"\bvalidation at iteration (\d+) \| lm loss value: {_NUMBER} \|")

Series = dict[int, float]  # value by step


@dataclass
class Curves:
    """What is drawn of one stage."""

    name: str
    loss: Series = field(default_factory=dict)
    validation: Series = field(default_factory=dict)
    learning_rates: dict[str, Series] = field(default_factory=dict)
    """By module."""

    def forget_from(self, step: int) -> None:
        """Drop what was logged of a step and later ones: the stage is resumed before it."""
        for series in (self.loss, self.validation, *self.learning_rates.values()):
            for late in [logged for logged in series if logged >= step]:
                del series[late]


def read_run(path: Path) -> list[Curves]:
    """The curves of every stage in a log file, or in all TensorBoard folders below a folder.

    Raises:
        UserError: the path does not exist or holds no training loss.
    """
    if path.is_dir():
        found = _read_folder(path)
    elif path.is_file():
        found = _read_log(path)
    else:
        raise UserError(f"'{path}' does not exist; give a run's folder or a log file")
    trained = [c for c in found if any(math.isfinite(value) for value in c.loss.values())]
    if not trained:
        raise UserError(
            f"'{path}' holds no '{LOSS_TAG}' value; give the run's logging.tensorboard_dir or its "
            "log file"
        )
    return trained


def _read_folder(path: Path) -> list[Curves]:
    """Curves in the order in which the stages were started."""
    files: dict[Path, list[Path]] = {}
    # The name of an event file begins with the time of its start.
    for file in sorted(path.rglob("events.out.tfevents.*"), key=lambda file: file.name):
        files.setdefault(file.parent, []).append(file)
    return [curves for folder in files for curves in _read_events(folder, files[folder])]


def _read_events(folder: Path, files: list[Path]) -> list[Curves]:
    """A file per start, the oldest first; several stages may have written into one folder."""
    # Imported here: reading a log file should not need tensorboard.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stages: dict[str, Curves] = {}
    for file in files:
        # 0 keeps every point instead of a sample of them.
        events = EventAccumulator(str(file), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        curves = stages.setdefault(_stage_of(events), Curves(_name(folder)))
        added = {tag: _series(events, tag) for tag in events.Tags()["scalars"]}
        if steps := [step for series in added.values() for step in series]:
            curves.forget_from(min(steps))
        curves.loss |= added.get(LOSS_TAG, {})
        curves.validation |= added.get(VALIDATION_TAG, {})
        for tag in (tag for tag in added if tag.startswith(RATE_PREFIX)):
            rates = curves.learning_rates.setdefault(tag.removeprefix(RATE_PREFIX), {})
            rates.update(added[tag])
    return _named(stages)


def _series(events: "EventAccumulator", tag: str) -> Series:
    return {event.step: float(event.value) for event in events.Scalars(tag)}


def _stage_of(events: "EventAccumulator") -> str:
    """The stage that wrote a file; empty for files from before they said so."""
    if STAGE_TAG not in events.Tags()["tensors"]:
        return ""
    return events.Tensors(STAGE_TAG)[0].tensor_proto.string_val[0].decode()


def _name(folder: Path) -> str:
    folder = folder.absolute()
    return folder.parent.name if folder.name == "tensorboard" else folder.name


def _named(stages: dict[str, Curves]) -> list[Curves]:
    """Curves called after their stages where there are several in one place."""
    if len(stages) > 1:
        for stage, curves in stages.items():
            curves.name = stage or curves.name
    return list(stages.values())


def _read_log(path: Path) -> list[Curves]:
    log = _Log(path.stem)
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            log.read(line)
    return _named(log.stages)


class _Log:
    """Takes a log's lines; each start of a stage says the stage's name."""

    def __init__(self, name: str) -> None:
        self.stages: dict[str, Curves] = {}
        self._name = name
        self._current = Curves(name)
        self._is_announced = False

    def read(self, line: str) -> None:
        if found := _STAGE.search(line):
            self._is_announced = True
            self._turn_to(found[1])
        elif self._is_announced and (found := _FIRST_STEP.search(line)):
            self._current.forget_from(int(found[1]))
        elif found := _VALIDATION.search(line):
            self._current.validation[int(found[1])] = float(found[2])
        elif found := _ITERATION.search(line):
            if not self._is_announced:  # a piece of a log; stages differ at least in length
                self._turn_to(f"{found[2]} iterations")
            step = int(found[1])
            self._current.loss[step] = float(found[3])
            rates = _RATES.search(line)
            words = rates[1].split() if rates else []
            for module, rate in zip(words[::2], words[1::2], strict=True):
                self._current.learning_rates.setdefault(module, {})[step] = float(rate)

    def _turn_to(self, stage: str) -> None:
        self._current = self.stages.setdefault(stage, Curves(self._name))


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
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt  # late: --help should not wait for it

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
    except OSError as error:
        raise UserError(f"the picture cannot be written: {explain(error, output)}") from error
    except ValueError as error:
        raise UserError(f"'{output}' cannot be written: {error}") from error
    finally:
        plt.close(figure)


def _draw_losses(axes: "Axes", curves: Curves, smoothing: float) -> None:
    steps, losses = finite_points(curves.loss)
    axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=0.8, label="training")
    axes.plot(steps, smooth(losses, smoothing), color="C0", linewidth=1.6, label="smoothed")
    steps, losses = finite_points(curves.validation)
    if steps:
        axes.plot(steps, losses, "o-", color="C3", markersize=4, linewidth=1, label="validation")
    axes.set_title(curves.name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _draw_rates(axes: "Axes", curves: Curves) -> None:
    for module, series in sorted(curves.learning_rates.items()):
        steps, rates = finite_points({step: rate for step, rate in series.items() if rate > 0})
        axes.plot(steps, rates, linewidth=1.2, label=module)
    if curves.learning_rates:
        axes.set_yscale("log")  # modules train at rates that differ by powers of ten
        axes.legend(fontsize="x-small")
    axes.grid(alpha=0.3)
    axes.set_xlabel("iteration")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders or log files")
    parser.add_argument("--output", type=Path, default=Path("loss.png"), help="picture to write")
    parser.add_argument(
        "--names", nargs="+", help="titles of the stages, by default their folders'"
    )
    parser.add_argument("--title", help="title of the picture")
    parser.add_argument(
        "--smoothing", type=float, default=0.9, help="weight of the past, from 0 to below 1"
    )
    return parser.parse_args(arguments)


def plot(arguments: argparse.Namespace) -> int:
    """Read the runs and draw them.

    Raises:
        UserError: an argument or a run cannot be used.
    """
    if not 0 <= arguments.smoothing < 1:
        raise UserError(f"--smoothing {arguments.smoothing} must be at least 0 and below 1")
    runs = [curves for path in arguments.runs for curves in read_run(path)]
    if arguments.names and len(arguments.names) != len(runs):
        found = ", ".join(curves.name for curves in runs)
        raise UserError(f"--names gives {len(arguments.names)} names to {len(runs)} runs: {found}")
    for curves, name in zip(runs, arguments.names or [], strict=False):
        curves.name = name
    draw(runs, arguments.output, smoothing=arguments.smoothing, title=arguments.title)
    for curves in runs:
        steps, losses = finite_points(curves.loss)
        print(f"{curves.name}: {len(steps)} points, last loss {losses[-1]:.4f} at {steps[-1]}")
    print(f"written: {arguments.output}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_tool(lambda: plot(options))


if __name__ == "__main__":
    sys.exit(main())
