"""How everything here is timed: rounds in alternating order, compared within a round.

A machine that others use changes its speed from minute to minute, so the time of one variant says
little. Each round runs every variant once, the order reversed every other round, and what counts is
the median over rounds of the ratio within a round. The first variant runs a second time in every
round: the ratio to itself is the noise floor, below which a difference is none.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from megatron_dattn.errors import ConfigError

Step = Callable[[], object]
Timer = Callable[[Step], float]
Clock = Callable[[], float]

DEFAULT_ROUNDS = 20
FEWEST_ROUNDS = 5
"""Fewer rounds show that a script runs, and are marked as no measurement."""
WARM_UP = 3


@dataclass(frozen=True)
class Spread:
    """Median and range of a figure over rounds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> "Spread":
        return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Timings:
    """Seconds per round and variant; `again` is the second run of the first variant."""

    seconds: dict[str, list[float]]
    again: list[float]

    @property
    def num_rounds(self) -> int:
        return len(self.again)

    def milliseconds(self, name: str) -> Spread:
        """The variant's own time: context, not a result."""
        return Spread.of([1000 * value for value in self.seconds[name]])

    def ratio(self, name: str, base: str) -> Spread:
        """Time of `name` over that of `base`, round by round."""
        return _ratio(self.seconds[name], self.seconds[base])

    @property
    def noise(self) -> Spread:
        """Time of the first variant's second run over its first."""
        return _ratio(self.again, next(iter(self.seconds.values())))


def _ratio(above: list[float], below: list[float]) -> Spread:
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def time_rounds(
    variants: Mapping[str, Step],
    *,
    rounds: int = DEFAULT_ROUNDS,
    timer: Timer,
    warm_up: int = WARM_UP,
    budget_seconds: float | None = None,
    clock: Clock = time.monotonic,
) -> Timings:
    """Time the variants side by side.

    Args:
        variants: what to run, by name; the first one is run twice per round.
        timer: seconds that one step takes, see `timer_of`.
        warm_up: untimed steps of each variant before the first round.
        budget_seconds: begin no further round after so many seconds of rounds; the first one is
            always run. `Timings.num_rounds` says how many it became.

    Raises:
        ConfigError: no variants or no rounds.
    """
    if not variants:
        raise ConfigError("there is nothing to time; name a variant")
    if rounds < 1:
        raise ConfigError(f"{rounds} rounds measure nothing; a result needs {FEWEST_ROUNDS}")
    for step in variants.values():
        for _ in range(warm_up):
            step()
    first = next(iter(variants))
    turns = [*((name, name) for name in variants), ("", first)]  # key of the result, variant
    seconds: dict[str, list[float]] = {key: [] for key, _ in turns}
    started = clock()
    for number in range(rounds):
        if number and budget_seconds is not None and clock() - started >= budget_seconds:
            break
        for key, name in turns if number % 2 == 0 else reversed(turns):
            seconds[key].append(timer(variants[name]))
    return Timings(again=seconds.pop(""), seconds=seconds)


def timer_of(device: torch.device) -> Timer:
    """Wall time on the host; time between events of the device's stream on CUDA."""
    return time_on_cuda if device.type == "cuda" else time_on_host


def time_on_host(step: Step, clock: Clock = time.perf_counter) -> float:
    """Seconds of one step."""
    started = clock()
    step()
    return clock() - started


def time_on_cuda(step: Step) -> float:
    """Seconds from an idle device until all work of one step is done."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000
