"""How many samples could not be used, and when they stop a run.

The counters are kept in the trainer's process, fed by what the workers send, and saved with the
loader's state. `data.max_skipped_fraction` is read as a share of all the data, by three rules; the
first two judge the samples of all ranks together, however many ranks there are:

- The share of the whole stage is judged with a margin: the run stops when the unusable ones are too
  many to be chance if no more than the limit were bad. At a limit of 0.1 that is 7 samples of which
  all are bad, about 390 of which a fifth is, or 5800 of which an eighth is. A limit of 0 needs no
  margin: the first unusable sample exceeds it. A limit of 1 is never exceeded.
- The share of recent samples is judged alike, with a wider margin: after a million good samples the
  share of the whole stage would hide an outage for another hundred thousand. See `RecentSamples`.
- A rank gives up when it meets nothing but unusable samples for so long that waiting has no sense:
  100 in a row at a limit up to 0.75, more at higher ones, and 10 000 at a limit of 1. Without it
  the other ranks would wait for a rank whose images are all missing.

The margins hold for samples that come in random order, as an epoch's do.
"""

import logging
import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_dattn.data.rejection import Reason, Rejection
from megatron_dattn.errors import DataError

logger = logging.getLogger(__name__)

VERBOSE_SKIPS = 20  # per reason; later ones are reported at powers of two

# A run in which no more than the limit is bad is stopped, ever, with at most these probabilities.
_CHANCE_OF_ALL = 1e-6
_CHANCE_OF_A_WINDOW = 1e-12  # of which a run has one per WINDOWS[0] samples, and some longer ones
_CHANCE_OF_A_RANK = 1e-12  # per place in a rank's stream, of which a run has many

_FEWEST_IN_A_RECORD, _MOST_IN_A_RECORD = 100, 10_000

WINDOWS = (1_000, 10_000, 100_000)
"""Samples after which a new window begins."""


@dataclass
class LoaderCounters:
    """Samples since the start of training, on this data-parallel rank."""

    seen: int = 0
    """Used and skipped samples together."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Skipped samples by reason."""
    fixed: dict[str, int] = field(default_factory=dict)
    """Used samples in which a problem was fixed, by problem; one may have several."""

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def copy(self) -> "LoaderCounters":
        return LoaderCounters(self.seen, dict(self.skipped), dict(self.fixed))


def as_counts(counters: LoaderCounters) -> list[float]:
    """The counters as numbers that can be summed over ranks."""
    skipped, fixed = counters.skipped, counters.fixed
    return [counters.seen, *(by.get(reason, 0) for by in (skipped, fixed) for reason in Reason)]


def from_counts(counts: Sequence[float]) -> LoaderCounters:
    """The inverse."""
    seen, *numbers = map(int, counts)
    skipped, fixed = numbers[: len(Reason)], numbers[len(Reason) :]
    return LoaderCounters(seen, _by_reason(skipped), _by_reason(fixed))


def _by_reason(numbers: Sequence[int]) -> dict[str, int]:
    named = zip(map(str, Reason), numbers, strict=True)
    return {reason: number for reason, number in named if number}


def count_pack(
    counters: LoaderCounters,
    used: int,
    rejections: tuple[Rejection, ...],
    fixed: tuple[Reason, ...] = (),
    *,
    failing: Collection[Reason] = (),
) -> None:
    """Add one pack's samples to the counters and report what was skipped.

    Args:
        fixed: problems that were fixed in the samples that are used.
        failing: problems that samples may not have.

    Raises:
        DataError: one has such a problem all the same.
    """
    counters.seen += used + len(rejections)
    for reason in fixed:
        counters.fixed[str(reason)] = counters.fixed.get(reason, 0) + 1
    for rejection in rejections:
        if rejection.reason in failing:
            raise DataError(
                f"sample {rejection.key} cannot be used ({rejection.reason}): "
                f"{rejection.message}; data.bad_samples=skip would go on without it, or "
                f"data.policies.{rejection.reason}=skip"
            )
        _skip(counters, rejection)


def _skip(counters: LoaderCounters, rejection: Rejection) -> None:
    number = counters.skipped.get(rejection.reason, 0) + 1
    counters.skipped[str(rejection.reason)] = number
    if number <= VERBOSE_SKIPS or number & (number - 1) == 0:
        logger.warning(
            "skipped sample %s (%s, number %d of that kind): %s",
            rejection.key,
            rejection.reason,
            number,
            rejection.message,
        )


def exceeds(num_bad: int, num_seen: int, limit: float, chance: float = _CHANCE_OF_ALL) -> bool:
    """True if more than the share `limit` of the data must be bad.

    The samples are looked at after every step, so a bound that holds at one time only would be
    crossed by chance some day. This one holds at all times together: it is Ville's inequality for
    the likelihood ratio of the counts under Krichevsky and Trofimov's mixture of all shares, whose
    logarithm is within log(n) / 2 + log(2) of n times the relative entropy.

    Args:
        chance: the probability that this is ever true although no more than the limit is bad.
    """
    if num_bad <= limit * num_seen:
        return False
    if limit == 0.0:
        return True
    needed = -math.log(chance) + math.log(num_seen) / 2 + math.log(2)
    return num_seen * _relative_entropy(num_bad / num_seen, limit) > needed


def _relative_entropy(share: float, limit: float) -> float:
    """Of drawing bad samples with one probability, to another, in nats; 0 < limit < share."""
    rest = (1 - share) * math.log((1 - share) / (1 - limit)) if share < 1 else 0.0
    return share * math.log(share / limit) + rest


def most_in_a_row(limit: float) -> int:
    """Unusable samples in a row after which a rank gives up."""
    if limit == 0.0:
        return _FEWEST_IN_A_RECORD
    if limit == 1.0:
        return _MOST_IN_A_RECORD
    by_chance = math.ceil(math.log(_CHANCE_OF_A_RANK) / math.log(limit))
    return max(_FEWEST_IN_A_RECORD, min(_MOST_IN_A_RECORD, by_chance))


def check_share(skipped: dict[str, int], num_seen: int, limit: float) -> None:
    """Judge the counts of all ranks.

    Args:
        skipped: unusable samples by reason.
        num_seen: samples, used and unusable ones.

    Raises:
        DataError: the limit is exceeded.
    """
    num_bad = sum(skipped.values())
    if exceeds(num_bad, num_seen, limit):
        raise DataError(
            f"{num_bad} of {num_seen} samples could not be used ({describe(skipped)}), more than "
            f"data.max_skipped_fraction {limit:g} allows; tools/check_data.py lists them"
        )


@dataclass(frozen=True)
class _Counts:
    """Of a stage, at one time."""

    seen: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


class RecentSamples:
    """The share of unusable samples in windows that end now.

    For every length in `WINDOWS` a new window begins after so many samples, at the end of a step,
    and is judged after every step until it is at least that long and the next one has become so:
    of each length one window is always full and one growing, and an outage meets a young one. At a
    limit of 0.1, a total one is noticed within some hundred samples; after a rise from nothing to
    0.15, half as much again as is allowed, some ten thousand are needed.

    The price is honest: a window that no more than the limit of the data would fill is stopped by
    chance with a probability of at most 1e-12 in its whole time, and windows begin as long as a run
    lasts. In a stage of 10^9 samples these are 1.11 million, so that a stage whose share is exactly
    the limit is stopped with a probability of at most 1.2e-6 by windows, beside 1e-6 by the whole.

    Nothing of it is saved. A resumed stage's first step closes the windows that would span the
    whole stage, so that an outage after a resume is noticed as soon, and the share of the whole
    stage, which is saved, holds for a run that never gets far.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._starts = {length: deque([_Counts()], maxlen=2) for length in WINDOWS}

    def check(self, skipped: dict[str, int], num_seen: int) -> None:
        """Judge the windows that end at these counts of the whole stage, over all ranks.

        Raises:
            DataError: one of them has too many unusable samples.
        """
        for length, starts in self._starts.items():
            for start in starts:
                self._judge(start, skipped, num_seen)
            if num_seen - starts[-1].seen >= length:
                starts.append(_Counts(num_seen, dict(skipped)))

    def _judge(self, start: _Counts, skipped: dict[str, int], num_seen: int) -> None:
        recent = {reason: n - start.skipped.get(reason, 0) for reason, n in skipped.items()}
        num_bad, length = sum(recent.values()), num_seen - start.seen
        if exceeds(num_bad, length, self._limit, _CHANCE_OF_A_WINDOW):
            raise DataError(
                f"{num_bad} of the last {length} samples could not be used ({describe(recent)}), "
                f"more than data.max_skipped_fraction {self._limit:g} allows, but "
                f"{sum(skipped.values())} of {num_seen} in the whole stage: is the storage of the "
                "images there? Then tools/check_data.py lists them. A run goes on from its last "
                "checkpoint"
            )


def describe(skipped: dict[str, int]) -> str:
    """The reasons that occurred with their numbers, the most frequent first."""
    by_number = sorted(skipped.items(), key=lambda item: -item[1])
    return ", ".join(f"{reason} {number}" for reason, number in by_number if number)
