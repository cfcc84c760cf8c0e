"""How far a score can be trusted: intervals and a paired test, both over whole images.

Questions about one image are right or wrong together, so it is images that are drawn again, each
with all its questions; questions without an image stand for themselves. Both are seeded: the same
scores give the same figures.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 2000
_FLIPS = 10_000
_TAIL = 2.5  # per cent beyond each end of an interval
_NUMBERS_AT_ONCE = 2**22
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Estimate:
    """A mean, and its 95 % interval; None where one image alone says nothing about others."""

    questions: int
    mean: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class PairedTest:
    """The mean of differences, and how likely as large a one is if neither is better."""

    difference: Estimate
    p_value: float


def estimate(scores: Sequence[float], images: Sequence[Hashable], *, seed: int = 0) -> Estimate:
    """Mean of scores with a bootstrap interval (percentiles of 2,000 draws).

    Args:
        scores: of each question, at least one.
        images: what each question is about; equal ones are drawn together.
    """
    sums, counts = _by_image(scores, images)
    mean = float(sums.sum() / counts.sum())
    if len(sums) == 1:
        return Estimate(len(scores), mean, None)
    generator, means = np.random.default_rng(seed), []
    for size in _blocks(_RESAMPLES, len(sums)):
        drawn = generator.integers(len(sums), size=(size, len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.percentile(np.concatenate(means), [_TAIL, 100 - _TAIL])
    return Estimate(len(scores), mean, (float(low), float(high)))


def compare(
    ours: Sequence[float], theirs: Sequence[float], images: Sequence[Hashable], *, seed: int = 0
) -> PairedTest:
    """Compare two runs' scores of the same questions by random exchanges (10,000 draws).

    If neither run is better, what they got for an image might as well be exchanged: the p-value is
    the share of random exchanges that leave a difference as large as the one found.
    """
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    sums, _ = _by_image(differences, images)
    found, as_large = abs(sums.sum()) - _ROUNDING, 0
    generator = np.random.default_rng(seed)
    for size in _blocks(_FLIPS, len(sums)):
        signs = generator.integers(2, size=(size, len(sums)), dtype=np.int8) * 2.0 - 1
        as_large += int((np.abs(signs @ sums) >= found).sum())
    return PairedTest(estimate(differences, images, seed=seed), (as_large + 1) / (_FLIPS + 1))


def _by_image(scores: Sequence[float], images: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of scores and number of questions of every image."""
    places: dict[Hashable, int] = {}
    place = np.array([places.setdefault(image, len(places)) for image in images])
    return np.bincount(place, weights=np.array(scores)), np.bincount(place)


def _blocks(total: int, width: int) -> list[int]:
    """Sizes of parts that fit into memory."""
    size = max(1, min(total, _NUMBERS_AT_ONCE // width))
    return [min(size, total - start) for start in range(0, total, size)]
