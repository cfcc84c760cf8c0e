"""Where the streams of samples are in the endless sequence, and how they are dealt anew.

A stream is what one loader process reads; together the streams of all data-parallel ranks read
every position of the sequence (epochs.py) once. A stream's place says which positions are still to
come: some that are named, then every `step`-th. The named ones were read but wait in the packing
buffer, or were left by streams that are no more. So a place is all that a checkpoint needs, and
when the number of ranks or of loader processes changes, what no stream has given out yet is dealt
to the new streams: nothing is lost and nothing shown twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StreamPlace:
    """The positions that a stream has still to give out, in their order."""

    ahead: np.ndarray
    """int64, ascending: these come first, all of them below `next`."""
    next: int
    """Then this one, and every `step`-th after it."""
    step: int

    def positions(self, first: int, count: int) -> np.ndarray:
        """int64 [count]: the positions from number `first` on, counted from 0."""
        named = self.ahead[first : first + count]
        skipped = max(0, first - len(self.ahead))
        following = self.next + self.step * np.arange(
            skipped, skipped + count - len(named), dtype=np.int64
        )
        return np.concatenate([named, following])

    def after(self, num_drawn: int, waiting: np.ndarray) -> "StreamPlace":
        """The place after some positions were drawn, of which some wait and come first again."""
        beyond = max(0, num_drawn - len(self.ahead))
        return StreamPlace(
            ahead=np.concatenate([waiting, self.ahead[num_drawn:]]).astype(np.int64),
            next=self.next + self.step * beyond,
            step=self.step,
        )


def first_places(rank: int, num_ranks: int, num_workers: int) -> list[StreamPlace]:
    """Places where the streams of a rank begin, one per loader process (or one for none)."""
    per_rank = max(1, num_workers)
    nothing = np.empty(0, np.int64)
    return [
        StreamPlace(nothing, next=rank * per_rank + worker, step=num_ranks * per_rank)
        for worker in range(per_rank)
    ]


def deal_anew(places: Sequence[StreamPlace], num_streams: int) -> list[StreamPlace]:
    """Deal what all streams together have still to give out to another number of streams.

    Up to the position that the fastest stream has come to, what is left is named; from there on
    nothing is drawn yet. Both are dealt in turn, the earlier positions first, so that an epoch is
    still shown to its end before the next one.

    Args:
        places: of every stream; their `next` are of all residues modulo their common `step`.
    """
    frontier = max(place.next for place in places)
    left = [place.ahead for place in places]
    left += [np.arange(place.next, frontier, place.step, dtype=np.int64) for place in places]
    named = np.sort(np.concatenate(left))
    return [
        StreamPlace(
            ahead=named[stream::num_streams],
            next=frontier + (stream - len(named)) % num_streams,
            step=num_streams,
        )
        for stream in range(num_streams)
    ]
