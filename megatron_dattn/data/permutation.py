"""A shuffled order of n things that is computed place by place instead of being stored.

An epoch's order over millions of records would cost every loader worker an array; this one costs a
key, and a resumed run finds its place without replaying anything. It is the swap-or-not shuffle
(Hoang, Morris and Rogaway 2012): in each round the numbers are paired by a random reflection, and a
random bit of each pair says whether its two members change places. Only integer arithmetic is used,
so that the order does not depend on the version of a random number generator.
"""

import numpy as np

_ROUNDS_PER_BIT = 8  # the proof asks for about 6 per bit of n
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def shuffled(places: np.ndarray, size: int, key: int) -> np.ndarray:
    """The thing that stands at each place of a shuffled order.

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
