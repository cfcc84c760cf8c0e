"""What a run says about itself: one greppable line per `log_interval`, and TensorBoard.

The line keeps Megatron's wording (`iteration`, `lm loss`, `grad norm`, ...), so that scripts made
for its logs read ours, and adds what a vision-language run needs: text and visual tokens per
second, the learning rate of each module, the share of time spent waiting for data.
"""

import logging
import math
import time
from dataclasses import dataclass, field
from datetime import timedelta
from statistics import fmean

from megatron_dattn.config.training import LoggingConfig
from megatron_dattn.data.skipped_samples import LoaderCounters, describe
from megatron_dattn.runtime.distributed import is_rank_0
from megatron_dattn.training.event_file import EventFile
from megatron_dattn.training.state import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """What one training step did, summed over all ranks and the same on every rank."""

    step: int
    """Steps done including this one."""
    loss: float
    """Mean loss of a labelled token; non-finite only if the step was skipped."""
    grad_norm: float
    """Before clipping."""
    skipped: bool
    """Loss or gradient was not finite: no rank has updated its weights."""
    learning_rates: dict[str, float]
    """The rates this step used, by trained module."""
    samples: int
    text_tokens: int
    """Valid text tokens, padding not counted."""
    visual_tokens: int
    """Valid visual tokens."""
    flops: float
    """Model FLOPs, padding and recomputation not counted."""
    seconds: float
    data_wait_seconds: float
    """Of these, spent waiting for the loader (mean over data-parallel ranks)."""
    loaded: LoaderCounters = field(default_factory=LoaderCounters)
    """Samples since the stage began: those that were skipped and what was fixed, by problem."""
    alpha: list[list[float]] | None = None
    """Mean alpha_V by layer and head, NaN where no text sees an image; None in most steps."""


class Metrics:
    """Collects the reports of an interval and writes them; only rank 0 writes."""

    def __init__(
        self,
        config: LoggingConfig,
        *,
        stage: str,
        train_iters: int,
        first_step: int,
        world_size: int,
        peak_flops: float | None,
    ) -> None:
        """
        Args:
            stage: its name, which TensorBoard's files keep: several may write into one folder.
            first_step: steps that the loaded checkpoint had done; TensorBoard drops later points.
            peak_flops: FLOP/s of one device, None where MFU has no meaning.
        """
        self._interval = config.log_interval
        self._train_iters = train_iters
        self._world_size = world_size
        self._peak = peak_flops
        self._reports: list[StepReport] = []
        self._problems: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self._interval_start = time.perf_counter()
        self._writer: EventFile | None = None
        if config.tensorboard_dir and is_rank_0():
            self._writer = EventFile(config.tensorboard_dir, purge_step=first_step + 1)
            self._writer.add_text("stage", stage, first_step)

    def record(self, report: StepReport, totals: Progress) -> None:
        """Take a step's report; write when the interval is full or the run is at its end."""
        self._reports.append(report)
        if report.step % self._interval == 0 or report.step == self._train_iters:
            self._write(totals)
        if report.alpha is not None and not report.skipped:
            self._write_alpha(report.step, report.alpha)

    def record_validation(self, step: int, loss: float) -> None:
        """Write a validation loss at once."""
        logger.info(
            "validation at iteration %d | lm loss value: %.6E | lm loss PPL: %.6E |",
            step,
            loss,
            math.exp(min(20.0, loss)),
        )
        if self._writer is not None:
            self._writer.add_scalars({"lm loss validation": loss}, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, totals: Progress) -> None:
        now = time.perf_counter()
        interval = Interval(self._reports, wall_seconds=now - self._interval_start)
        self._reports, self._interval_start = [], now
        logger.info(self._line(interval, totals))
        self._say_problems(interval.last)
        if self._writer is not None:
            self._writer.add_scalars(self._scalars(interval, totals), interval.last.step)

    def _say_problems(self, last: StepReport) -> None:
        """Say what was wrong with samples so far, where that has changed since the last line."""
        found = (last.loaded.skipped, last.loaded.fixed)
        if found != self._problems:
            self._problems = found
            skipped, fixed = (describe(counts) or "none" for counts in found)
            logger.info(
                "iteration %d | skipped samples: %s | fixed problems: %s", last.step, skipped, fixed
            )

    def _write_alpha(self, step: int, weights: list[list[float]]) -> None:
        layers = [_describe_layer(number, heads) for number, heads in enumerate(weights, 1)]
        logger.info("iteration %d | alpha_V: %s", step, " | ".join(layers))
        if self._writer is not None:
            self._writer.add_scalars(_alpha_scalars(weights), step)

    def _line(self, interval: "Interval", totals: Progress) -> str:
        last = interval.last
        left = (self._train_iters - last.step) * interval.wall_seconds / interval.num_steps
        rates = " ".join(f"{name} {rate:.3E}" for name, rate in last.learning_rates.items())
        tflops = interval.per_second("flops") / self._world_size / 1e12
        fields = {
            "consumed samples": f"{totals.consumed_samples}",
            "elapsed time per iteration (ms)": f"{1e3 * interval.seconds / interval.num_steps:.1f}",
            "eta": str(timedelta(seconds=round(left))),
            "learning rate": rates,
            "lm loss": f"{interval.loss:.6E}",
            "grad norm": f"{last.grad_norm:.3f}",
            "text tokens/s": f"{interval.per_second('text_tokens'):.0f}",
            "visual tokens/s": f"{interval.per_second('visual_tokens'):.0f}",
            "samples/s": f"{interval.per_second('samples'):.1f}",
            "data wait": f"{100 * interval.data_wait_share:.1f}%",
            "throughput per GPU (TFLOP/s/GPU)": f"{tflops:.3f}",
            "MFU": "n/a" if self._peak is None else f"{100 * tflops * 1e12 / self._peak:.1f}%",
            "number of skipped iterations": f"{totals.skipped_steps}",
            "number of skipped samples": f"{totals.skipped_samples}",
            "number of fixed problems": f"{totals.fixed_problems}",
        }
        width = len(str(self._train_iters))
        head = f"iteration {last.step:{width}d}/{self._train_iters} | "
        return head + "".join(f"{name}: {value} | " for name, value in fields.items()).rstrip()

    def _scalars(self, interval: "Interval", totals: Progress) -> dict[str, float]:
        last = interval.last
        scalars = {
            "lm loss": interval.loss,
            "grad norm": last.grad_norm,
            "iteration time (s)": interval.seconds / interval.num_steps,
            "data wait share": interval.data_wait_share,
            "throughput/TFLOP per s per GPU": interval.per_second("flops")
            / self._world_size
            / 1e12,
            "skipped/iterations": totals.skipped_steps,
            "skipped/samples": totals.skipped_samples,
            **{f"skipped samples/{name}": n for name, n in last.loaded.skipped.items()},
            **{f"fixed problems/{name}": n for name, n in last.loaded.fixed.items()},
        }
        for name in ("text_tokens", "visual_tokens", "samples"):
            scalars[f"throughput/{name} per s"] = interval.per_second(name)
        for module, rate in last.learning_rates.items():
            scalars[f"learning rate/{module}"] = rate
        return scalars


def _alpha_scalars(weights: list[list[float]]) -> dict[str, float]:
    """The mean of every layer that sees images, and each of its heads."""
    scalars: dict[str, float] = {}
    for number, heads in enumerate(weights, 1):
        if not math.isnan(fmean(heads)):
            layer = f"alpha_V/layer_{number:02d}"
            scalars[layer] = fmean(heads)
            scalars |= {f"{layer}/head_{head:02d}": value for head, value in enumerate(heads, 1)}
    return scalars


def _describe_layer(number: int, heads: list[float]) -> str:
    if math.isnan(fmean(heads)):
        return f"layer {number} sees no image"
    return f"layer {number} mean {fmean(heads):.2f} (heads {min(heads):.2f} to {max(heads):.2f})"


@dataclass(frozen=True)
class Interval:
    """The steps between two log lines."""

    reports: list[StepReport]
    wall_seconds: float
    """Checkpoints and validation included, for the time that is left."""

    @property
    def last(self) -> StepReport:
        return self.reports[-1]

    @property
    def num_steps(self) -> int:
        return len(self.reports)

    @property
    def seconds(self) -> float:
        """Spent in training steps alone."""
        return sum(report.seconds for report in self.reports)

    @property
    def loss(self) -> float:
        """Mean over the steps that counted; NaN if none did."""
        losses = [report.loss for report in self.reports if not report.skipped]
        return sum(losses) / len(losses) if losses else math.nan

    @property
    def data_wait_share(self) -> float:
        return sum(report.data_wait_seconds for report in self.reports) / self.seconds

    def per_second(self, field: str) -> float:
        """A counter of the reports per second of training."""
        return sum(getattr(report, field) for report in self.reports) / self.seconds
