"""Order, ratios and budget of the rounds, on a clock that the test moves."""

import pytest

from benchmarks.protocol import Spread, Step, time_on_host, time_rounds
from megatron_dattn.errors import ConfigError


class Machine:
    """Steps that take a given time each and are noted in the order in which they ran."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        self._seconds = {name: iter(values) for name, values in seconds.items()}

    def step(self, name: str) -> Step:
        def run() -> None:
            self.calls.append(name)
            self.now += next(self._seconds[name])

        return run

    def clock(self) -> float:
        return self.now

    def time(self, step: Step) -> float:
        return time_on_host(step, self.clock)


def machine_of(seconds: dict[str, list[float]]) -> tuple[Machine, dict[str, Step]]:
    machine = Machine(seconds)
    return machine, {name: machine.step(name) for name in seconds}


def test_order_is_reversed_every_other_round_and_the_first_runs_twice() -> None:
    machine, steps = machine_of({name: [1.0] * 9 for name in "ABC"})
    time_rounds(steps, rounds=3, timer=machine.time, warm_up=1)
    assert "".join(machine.calls) == "ABC" + "ABCA" + "ACBA" + "ABCA"


def test_ratios_are_taken_within_a_round() -> None:
    # The machine slows down threefold; B takes twice A's time in every round but the last.
    machine, steps = machine_of({"A": [1, 1, 3, 3, 9, 9], "B": [2, 6, 9]})
    timings = time_rounds(steps, rounds=3, timer=machine.time, warm_up=0)
    assert timings.num_rounds == 3
    assert timings.ratio("B", "A") == Spread(2.0, 1.0, 2.0)
    assert timings.milliseconds("B") == Spread(6000.0, 2000.0, 9000.0)


def test_the_noise_floor_is_the_first_variant_against_itself() -> None:
    # The second run of A comes last in even rounds and first in odd ones.
    machine, steps = machine_of({"A": [2, 3, 4, 2, 1, 1]})
    timings = time_rounds(steps, rounds=3, timer=machine.time, warm_up=0)
    assert timings.seconds["A"] == [2, 2, 1]
    assert timings.again == [3, 4, 1]
    assert timings.noise == Spread(1.5, 1.0, 2.0)


@pytest.mark.parametrize(("budget", "rounds"), [(None, 5), (100.0, 5), (5.0, 3), (0.0, 1)])
def test_no_round_begins_after_the_budget(budget: float | None, rounds: int) -> None:
    """A round takes two seconds; warm-up does not count, and one round is always run."""
    machine, steps = machine_of({"A": [1.0] * 20})
    timings = time_rounds(
        steps,
        rounds=5,
        timer=machine.time,
        warm_up=3,
        budget_seconds=budget,
        clock=machine.clock,
    )
    assert timings.num_rounds == rounds


def test_nothing_to_do_is_an_error() -> None:
    machine, steps = machine_of({"A": [1.0]})
    with pytest.raises(ConfigError, match="0 rounds"):
        time_rounds(steps, rounds=0, timer=machine.time)
    with pytest.raises(ConfigError, match="name a variant"):
        time_rounds({}, rounds=5, timer=machine.time)
