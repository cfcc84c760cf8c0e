"""How many samples were used and how many were not, and when to stop.

Kept in the trainer's process, fed by what the workers send, saved with the loader's state.
"""

import logging
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_dattn.data.rejection import Rejection
from megatron_dattn.errors import DataError

MIN_SEEN = 100  # the share of skipped samples means nothing before
VERBOSE_SKIPS = 20  # per reason; later ones are reported at powers of two

logger = logging.getLogger(__name__)


@dataclass
class LoaderCounters:
    """Samples since the start of training, on this data-parallel rank."""

    seen: int = 0
    """Used and skipped samples together."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Skipped samples by reason."""

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def copy(self) -> "LoaderCounters":
        return LoaderCounters(self.seen, dict(self.skipped))


@dataclass(frozen=True)
class SkipPolicy:
    """What bad samples mean for the run."""

    fail: bool
    max_fraction: float

    def count(self, counters: LoaderCounters, used: int, rejections: tuple[Rejection, ...]) -> None:
        """Add one pack's samples to the counters and report what was skipped.

        Raises:
            DataError: bad samples are not allowed, or there are too many of them.
        """
        counters.seen += used + len(rejections)
        for rejection in rejections:
            if self.fail:
                raise DataError(
                    f"sample {rejection.key} cannot be used ({rejection.reason}): "
                    f"{rejection.message}; data.bad_samples=skip would go on without it"
                )
            self._skip(counters, rejection)
        if counters.seen >= MIN_SEEN and counters.num_skipped > self.max_fraction * counters.seen:
            self._stop(counters)

    def _skip(self, counters: LoaderCounters, rejection: Rejection) -> None:
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

    def _stop(self, counters: LoaderCounters) -> None:
        reasons = ", ".join(f"{reason} {number}" for reason, number in counters.skipped.items())
        raise DataError(
            f"{counters.num_skipped} of {counters.seen} samples could not be used ({reasons}), "
            f"more than data.max_skipped_fraction {self.max_fraction}; tools/check_data.py "
            "lists them"
        )
