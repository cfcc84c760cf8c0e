"""The endless sequence: epochs that are whole, shuffled, and the same for every way of sharing."""

from collections import Counter

import numpy as np
import pytest

from megatron_dattn.data.epochs import EpochOrder, shuffled

GOLDEN_OF_EIGHT = [0, 7, 3, 5, 4, 1, 2, 6]
GOLDEN_OF_A_MIXTURE = [(0, 2), (1, 1), (0, 0), (1, 0), (0, 1)]


def sequence(order: EpochOrder, first: int, count: int, step: int = 1) -> list[tuple[int, int]]:
    """(file, record) at first, first + step, ..."""
    records = order.records(first + step * np.arange(count))
    return list(zip(records.files.tolist(), records.numbers.tolist(), strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 64, 1000, 4097])
def test_a_shuffled_order_has_everything_once(size: int) -> None:
    orders = [shuffled(np.arange(size), size, key) for key in (0, 1, 2**63)]
    for order in orders:
        assert sorted(order) == list(range(size))
    if size >= 64:
        assert not np.array_equal(orders[0], orders[1])
        assert not np.array_equal(orders[0], np.arange(size))


def test_all_orders_of_four_occur_equally_often() -> None:
    orders = Counter(tuple(shuffled(np.arange(4), 4, key).tolist()) for key in range(4800))
    assert len(orders) == 24
    # 200 each are expected; five standard deviations are 69.
    assert max(abs(number - 200) for number in orders.values()) < 69


def test_the_order_of_millions_is_computed_place_by_place() -> None:
    size = 4_000_000
    places = np.arange(3, size, 4001)
    found = shuffled(places, size, 7)
    assert len(set(found.tolist())) == len(places)
    assert found.min() >= 0
    assert found.max() < size
    assert shuffled(places[5:6], size, 7)[0] == found[5]
    # Places and things of 1000 pairs: five standard deviations of a correlation are 0.16.
    assert abs(np.corrcoef(places, found)[0, 1]) < 0.16


def test_an_order_never_changes() -> None:
    """A resumed run must find the samples that an earlier version of the code would have shown."""
    assert shuffled(np.arange(8), 8, 12345).tolist() == GOLDEN_OF_EIGHT
    assert sequence(EpochOrder.of([3, 2], [1.0, 1.0], 7), 0, 5) == GOLDEN_OF_A_MIXTURE


@pytest.mark.parametrize("sizes", [[4], [1], [400], [17, 3, 1]])
def test_every_epoch_shows_every_record_once_in_another_order(sizes: list[int]) -> None:
    order = EpochOrder.of(sizes, [1.0] * len(sizes), seed=3)
    length = sum(sizes)
    everything = sorted((file, record) for file, size in enumerate(sizes) for record in range(size))
    epochs = [sequence(order, epoch * length, length) for epoch in range(6)]
    for epoch in epochs:
        assert sorted(epoch) == everything
    assert length == 1 or len({tuple(epoch) for epoch in epochs}) > 1
    other = EpochOrder.of(sizes, [1.0] * len(sizes), seed=4)
    assert length == 1 or epochs != [sequence(other, e * length, length) for e in range(6)]


@pytest.mark.parametrize("streams", [1, 2, 3, 8])
def test_streams_share_the_sequence(streams: int) -> None:
    """Also more streams than an epoch has records."""
    order = EpochOrder.of([5, 2], [1.0, 1.0], seed=1)
    whole = sequence(order, 0, 8 * 7)
    for stream in range(streams):
        part = whole[stream::streams]
        assert sequence(order, stream, len(part), streams) == part


def test_weights_count_how_often_an_epoch_shows_a_record() -> None:
    order = EpochOrder.of([6, 4, 8], [1.0, 2.0, 0.5], seed=9)
    assert order.quotas == (6, 8, 4)
    first, second = (sequence(order, epoch * 18, 18) for epoch in (0, 1))
    for epoch in (first, second):
        counts = Counter(epoch)
        assert {counts[0, record] for record in range(6)} == {1}
        assert {counts[1, record] for record in range(4)} == {2}
        assert sum(counts[2, record] for record in range(8)) == 4
    assert {Counter(first + second)[2, record] for record in range(8)} == {1}


def test_the_smallest_weight_still_shows_something() -> None:
    assert EpochOrder.of([10, 3], [1.0, 0.001], seed=0).quotas == (10, 1)
