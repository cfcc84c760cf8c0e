"""Streams of many ranks: every sample of an epoch once, through stops and changes of their number.

Ranks are simulated in one process by the classes that the loaders are made of; samples have sizes
but no content.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from megatron_dattn.data.epochs import EpochOrder
from megatron_dattn.data.loader_state import (
    RANK,
    RANKS,
    WORKERS,
    deal_states_anew,
    dump_state,
    load_state,
    make_state,
    places_of,
)
from megatron_dattn.data.packing import Budgets, choose_pack
from megatron_dattn.data.places import StreamPlace, deal_anew, first_places
from megatron_dattn.data.skipped_samples import LoaderCounters
from megatron_dattn.errors import CheckpointError

BUDGETS = Budgets(visual=5832, text=2500, samples=16)


def test_a_place_counts_on_from_what_waits() -> None:
    place = StreamPlace(np.array([3, 5]), next=10, step=4)
    assert place.positions(0, 5).tolist() == [3, 5, 10, 14, 18]
    assert place.positions(1, 2).tolist() == [5, 10]
    assert place.positions(4, 2).tolist() == [18, 22]
    after = place.after(4, np.array([5, 14]))
    assert after.positions(0, 4).tolist() == [5, 14, 18, 22]
    early = place.after(1, np.array([3]))
    assert early.positions(0, 4).tolist() == [3, 5, 10, 14]


@pytest.mark.parametrize(("before", "after"), [(1, 1), (4, 2), (2, 5), (3, 1)])
def test_what_is_left_is_dealt_anew(before: int, after: int) -> None:
    places = [place for rank in range(before) for place in first_places(rank, before, 1)]
    given_out: list[int] = []
    for stream, place in enumerate(places):
        drawn = place.positions(0, 3 + 2 * stream)  # at different speeds
        given_out += drawn[1::2].tolist()
        places[stream] = place.after(len(drawn), drawn[::2])
    dealt = deal_anew(places, after)
    shares = [place.positions(0, 60 // after) for place in dealt]
    assert max(map(len, shares)) - min(map(len, shares)) == 0
    for share in shares:
        assert np.array_equal(share, np.sort(share))
    rest = np.concatenate(shares).tolist()
    assert sorted(given_out + rest) == list(range(len(given_out) + len(rest)))


@dataclass(frozen=True)
class Sized:
    position: int
    num_visual_tokens: int
    num_text_tokens: int
    epoch: int


class Stream:
    """One loader process: draws, packs and remembers as a PackStream does."""

    def __init__(self, order: EpochOrder, place: StreamPlace) -> None:
        self.order, self.first = order, place
        self.num_drawn = 0
        self.buffer: list[Sized] = []

    def next_pack(self, look_ahead: int = 24) -> list[int]:
        missing = look_ahead - len(self.buffer)
        for position in self.first.positions(self.num_drawn, missing).tolist():
            epoch, size = self.order.epoch(position), position * 2654435761 % 1000
            self.buffer.append(Sized(position, 729 * (size % 16 > 0), 30 + size, epoch))
        self.num_drawn += missing
        chosen = choose_pack(self.buffer, BUDGETS, keep_order=False)
        pack = [self.buffer[number].position for number in chosen]
        self.buffer = [s for number, s in enumerate(self.buffer) if number not in chosen]
        return pack

    def place(self) -> StreamPlace:
        return self.first.after(self.num_drawn, np.array([s.position for s in self.buffer]))


class Ranks:
    """The loaders of all data-parallel ranks."""

    def __init__(self, order: EpochOrder, states: list[bytes]) -> None:
        self.order, self.states = order, states
        self.streams = [
            [Stream(order, place) for place in places_of(load_state(state))] for state in states
        ]

    def step(self) -> list[int]:
        """The positions of one pack of every rank, whose processes take turns."""
        shown: list[int] = []
        for streams in self.streams:
            shown += streams[0].next_pack()
            streams.append(streams.pop(0))
        return shown

    def save(self) -> list[bytes]:
        return [
            states_of(len(self.states), rank, [stream.place() for stream in streams])
            for rank, streams in enumerate(self.streams)
        ]


def states_of(num_ranks: int, rank: int, places: list[StreamPlace]) -> bytes:
    identity = {"seed": 1, RANK: rank, RANKS: num_ranks, WORKERS: len(places)}
    return dump_state(make_state(identity, LoaderCounters(seen=1), places))


def start(order: EpochOrder, num_ranks: int, num_workers: int) -> Ranks:
    states = [
        states_of(num_ranks, rank, first_places(rank, num_ranks, num_workers))
        for rank in range(num_ranks)
    ]
    return Ranks(order, states)


@pytest.mark.parametrize(
    ("sizes", "plan"),
    [
        ((3000, 900), [(4, 2, 9), (2, 2, 15), (1, 1, 30), (4, 2, 14), (4, 3, 500)]),
        ((24_000, 8_768), [(1024, 1, 2), (512, 1, 3), (512, 2, 2), (1024, 1, 8)]),
    ],
)
def test_every_sample_of_an_epoch_is_shown_once(
    sizes: tuple[int, ...], plan: list[tuple[int, int, int]]
) -> None:
    """Ranks, loader processes and steps of each run; between them a kill that loses some steps."""
    order = EpochOrder.of(sizes, [1.0] * len(sizes), seed=3)
    shown: Counter[int] = Counter()
    ranks = start(order, *plan[0][:2])
    random = np.random.default_rng(5)
    for num_ranks, num_workers, num_steps in plan:
        states = ranks.save()
        if (len(states), len(ranks.streams[0])) != (num_ranks, num_workers):
            states = deal_states_anew(states, num_ranks, num_workers)
        ranks = Ranks(order, states)
        for _ in range(num_steps):
            shown.update(ranks.step())
        states = ranks.save()
        lost = [ranks.step() for _ in range(int(random.integers(1, 3)))]
        ranks = Ranks(order, states)
        assert ranks.step() == lost[0], "the same ranks go on with the very same packs"
        ranks = Ranks(order, states)
    assert set(shown.values()) == {1}
    first_epoch = set(range(order.length))
    assert first_epoch <= set(shown)
    records = order.records(np.arange(order.length))
    pairs = zip(records.files.tolist(), records.numbers.tolist(), strict=True)
    assert Counter(pairs) == Counter((f, n) for f, size in enumerate(sizes) for n in range(size))


def test_states_of_different_runs_are_refused() -> None:
    states = [states_of(2, rank, first_places(rank, 2, 1)) for rank in range(2)]
    assert len(deal_states_anew(states, 3, 2)) == 3
    for wrong in (states[:1], states[::-1], [states[0], states_of(3, 1, first_places(1, 3, 1))]):
        with pytest.raises(CheckpointError, match="not those of one run's ranks"):
            deal_states_anew(wrong, 1, 1)


def test_counts_are_kept_in_sum() -> None:
    states = [states_of(4, rank, first_places(rank, 4, 1)) for rank in range(4)]
    counters = [load_state(s)["counters"]["seen"] for s in deal_states_anew(states, 2, 1)]
    assert counters == [4, 0]
