"""How many samples were used and how many were not.

Kept in the trainer's process, fed by what the workers send, saved with the loader's state. Whether
they are too many is judged over all ranks, see skip_limit.py.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_dattn.data.rejection import Reason, Rejection
from megatron_dattn.errors import DataError

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


def as_counts(counters: LoaderCounters) -> list[float]:
    """Samples seen and those skipped for each reason, as numbers that can be summed over ranks."""
    return [counters.seen, *(counters.skipped.get(reason, 0) for reason in Reason)]


def from_counts(counts: Sequence[float]) -> tuple[int, dict[str, int]]:
    """The inverse: samples seen, and those skipped by reason."""
    seen, *skipped = map(int, counts)
    return seen, dict(zip(map(str, Reason), skipped, strict=True))


def count_pack(
    counters: LoaderCounters, used: int, rejections: tuple[Rejection, ...], *, fail: bool
) -> None:
    """Add one pack's samples to the counters and report what was skipped.

    Args:
        fail: unusable samples are not allowed.

    Raises:
        DataError: there is one all the same.
    """
    counters.seen += used + len(rejections)
    for rejection in rejections:
        if fail:
            raise DataError(
                f"sample {rejection.key} cannot be used ({rejection.reason}): "
                f"{rejection.message}; data.bad_samples=skip would go on without it"
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
