"""Why a sample is not used, and how many were not.

Real data sets hold missing images, empty answers and records that do not fit. Such a sample is
never dropped in silence: it is rejected with one of these reasons, which are what the loader counts
and what `tools/check_data.py` tabulates. The counters are kept in the trainer's process, fed by
what the workers send, and saved with the loader's state. Whether the unusable samples are too many
is judged over all ranks, see skipped_samples.py.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from megatron_dattn.errors import DataError, shortened

MAX_MESSAGE = 300  # characters: a rejection is one line of a log or of a table
VERBOSE_SKIPS = 20  # per reason; later ones are reported at powers of two

logger = logging.getLogger(__name__)


class Reason(StrEnum):
    """The kinds of unusable samples."""

    BAD_RECORD = "bad_record"  # no JSON object of LLaVA's form, more than 16 MiB, half a character
    ODD_ROLES = "odd_roles"
    NO_ANSWER = "no_answer"
    EMPTY_ANSWER = "empty_answer"
    NOT_A_CAPTION = "not_a_caption"
    IMAGE_COUNT = "image_count"
    CONTROL_TOKEN = "control_token"
    MISSING_IMAGE = "missing_image"  # not there, or a path that no file below the root can have
    BROKEN_IMAGE = "broken_image"  # damaged, of another format, too large or too much work
    TOO_MUCH_TEXT = "too_much_text"
    TOO_MANY_IMAGES = "too_many_images"


class SampleError(DataError):
    """One sample that cannot be used, and why: in one line, whatever the sample holds."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(shortened(" ".join(message.split()), MAX_MESSAGE))
        self.reason = reason


@dataclass(frozen=True)
class Rejection:
    """What is remembered of a rejected sample."""

    key: str
    reason: Reason
    message: str


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
