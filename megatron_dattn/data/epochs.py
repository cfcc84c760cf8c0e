"""Which record comes when: a mixture of files as one endless shuffled sequence, epoch after epoch.

An epoch shows every record of a file `weight` times: once where no weight is given, so that a
file's share of the training is its records over all. All data-parallel ranks and loader workers
walk through the same sequence, each taking every n-th position, so that together they show every
record of an epoch once, and so that files in which similar records stand together are dealt evenly.

The order is computed place by place. Stored, an epoch's order over millions of records would cost
every loader worker an array; so it costs a key, and a resumed run finds its place without replaying
anything.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROUNDS_PER_BIT = 8  # the proof asks for about 6 per bit of n
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def records_per_epoch(num_records: int, weight: float) -> int:
    """Number of records of a file that an epoch shows: at least one."""
    return max(1, round(weight * num_records))


@dataclass(frozen=True)
class Records:
    """Records at some positions of the sequence, as arrays of the same length."""

    files: np.ndarray  # int64: which file
    numbers: np.ndarray  # int64: which record of it


@dataclass(frozen=True)
class EpochOrder:
    """The endless sequence. Positions count from 0 over all epochs."""

    sizes: tuple[int, ...]
    """Records of each file."""
    quotas: tuple[int, ...]
    """Records of each file in an epoch."""
    seed: int

    @classmethod
    def of(cls, sizes: Sequence[int], weights: Sequence[float], seed: int) -> "EpochOrder":
        quotas = [records_per_epoch(*file) for file in zip(sizes, weights, strict=True)]
        return cls(tuple(sizes), tuple(quotas), seed)

    @property
    def length(self) -> int:
        """Records of an epoch."""
        return sum(self.quotas)

    def epoch(self, position: int) -> int:
        return position // self.length

    def records(self, positions: np.ndarray) -> Records:
        """The records at int64 positions of any epochs, in any order."""
        files, numbers = np.empty_like(positions), np.empty_like(positions)
        epochs = positions // self.length
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            files[chosen], numbers[chosen] = self._of_epoch(epoch, positions[chosen])
        return Records(files, numbers)

    def _of_epoch(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Files and numbers of the records at positions of one epoch."""
        places = positions - epoch * self.length
        drawn = shuffled(places, self.length, self._key("epoch", epoch))
        ends = np.cumsum(self.quotas)
        files = np.searchsorted(ends, drawn, side="right")
        numbers = np.empty_like(drawn)
        for file in np.unique(files):
            chosen = files == file
            start = int(ends[file]) - self.quotas[file]
            numbers[chosen] = self._numbers(int(file), epoch, drawn[chosen] - start)
        return files, numbers

    def _numbers(self, file: int, epoch: int, places: np.ndarray) -> np.ndarray:
        """Records at some places of a file's quota in an epoch.

        Epoch after epoch a file goes through shuffled passes over its records. A quota need not be
        whole passes: the next epoch goes on where this one ended, so that with weight 0.5 two
        epochs show every record once.
        """
        size = self.sizes[file]
        passes, numbers = np.divmod(epoch * self.quotas[file] + places, size)
        if self.quotas[file] == size:
            return numbers  # one pass per epoch, and the epoch itself is shuffled
        for number in np.unique(passes):
            chosen = passes == number
            numbers[chosen] = shuffled(
                numbers[chosen], size, self._key(f"file {file}", int(number))
            )
        return numbers

    def _key(self, what: str, number: int) -> int:
        text = f"seed {self.seed}, {what}, {number}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def shuffled(places: np.ndarray, size: int, key: int) -> np.ndarray:
    """The thing that stands at each place of a shuffled order.

    It is the swap-or-not shuffle (Hoang, Morris and Rogaway 2012): in each round the numbers are
    paired by a random reflection, and a random bit of each pair says whether its two members change
    places. Only integer arithmetic is used, so that the order does not depend on the version of a
    random number generator.

    Args:
        places: int64 numbers from 0 to size - 1, of any shape.
        size: how many things are ordered, at least 1.
        key: chooses the order; any integer from 0 to 2 ** 64 - 1.

    Returns:
        int64 of the same shape: a bijection of 0 .. size - 1 for each size and key.
    """
    assert size >= 1
    found, count = places.astype(np.uint64), np.uint64(size)
    num_rounds = _ROUNDS_PER_BIT * size.bit_length()
    keys = _mixed(np.uint64(key) + _GOLDEN * np.arange(1, 2 * num_rounds + 1, dtype=np.uint64))
    for pivot, secret in keys.reshape(num_rounds, 2):
        partner = (pivot % count + count - found) % count
        swapped = _mixed(np.maximum(found, partner) ^ secret) & np.uint64(1)
        found = np.where(swapped == 1, partner, found)
    return found.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the result depends on every bit of the value.

    Products wrap modulo 2 ** 64, as arrays of uint64 do without a warning.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
