"""Which samples share a pack: the best filling that a look-ahead buffer of samples allows.

A pack has room for so many visual tokens, text tokens and samples. The oldest sample of the buffer
opens it, so that none waits for ever; the others are chosen from the whole buffer, each so that the
room that is left is filled evenly, and then exchanged one by one as long as that leaves less of it.
This is done twice, once with the largest sample that fits beside the oldest, and the fuller pack is
taken: else large samples would wait until they are the oldest, and the small ones that would have
filled their packs were gone.
Packs that are full of both kinds of tokens cost the same whatever each kind costs, which is what
keeps data-parallel ranks, each packing for itself, from waiting for each other.

What is chosen follows from the samples in the buffer alone: no random number, no memory of earlier
packs, and no size that other ranks would have to know.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

_MOST_EXCHANGES = 8
# Below this share of a budget a kind of tokens is held to the share that the buffer has of it: the
# budget is not the limit, and filling it would leave packs for later that hold little of the kind.
_LOOSE = 0.75
_ROUNDING = 1e-9


class Sized(Protocol):
    """Anything with token counts."""

    @property
    def num_visual_tokens(self) -> int: ...

    @property
    def num_text_tokens(self) -> int: ...

    @property
    def epoch(self) -> int: ...


@dataclass(frozen=True)
class Budgets:
    """Room of an empty pack."""

    visual: int
    text: int
    samples: int

    def sizes(self, samples: Sequence[Sized]) -> np.ndarray:
        """float64 [2, samples]: shares of the visual and of the text budget."""
        visual = [sample.num_visual_tokens for sample in samples]
        text = [sample.num_text_tokens for sample in samples]
        return np.array([visual, text]) / np.array([[self.visual], [self.text]])


def choose_pack(samples: Sequence[Sized], budgets: Budgets, *, keep_order: bool) -> list[int]:
    """The samples of the next pack, in their order; the first is always one of them.

    Args:
        samples: the buffer, at least one, the oldest first: of one epoch, or of an epoch's end and
            what follows. An epoch is given out to its last sample before another begins; only the
            pack that its last samples do not fill takes of the next.
        keep_order: take the first samples, as many as fit.

    Raises:
        ValueError: the first sample does not fit an empty pack.
    """
    sizes = budgets.sizes(samples)
    if (sizes[:, 0] > 1).any():
        raise ValueError(
            f"a sample has {samples[0].num_visual_tokens} visual and {samples[0].num_text_tokens} "
            f"text tokens; the budgets are {budgets.visual} and {budgets.text}"
        )
    fitting = _fitting_from_the_first(sizes[:, : budgets.samples])
    # Where the number of samples is the limit, no other choice has more of them.
    if keep_order or fitting == budgets.samples:
        return list(range(fitting))
    of_epoch = sum(sample.epoch == samples[0].epoch for sample in samples)
    members = _fullest(sizes[:, :of_epoch], budgets.samples)
    if len(members) == of_epoch < len(samples):
        members = _Pack(sizes, budgets.samples, members).filled().members
    return sorted(members)


def _fullest(sizes: np.ndarray, max_samples: int) -> list[int]:
    """The fuller pack of the first sample without and with the largest that fits beside it."""
    pack = _Pack(sizes, max_samples, [0]).filled()
    beside = (sizes[:, :1] + sizes <= 1 + _ROUNDING).all(axis=0)
    beside[0] = False
    if max_samples > 1 and beside.any():
        largest = int(np.argmax(np.where(beside, sizes.max(axis=0), -1.0)))
        other = _Pack(sizes, max_samples, [0, largest]).filled()
        if other.missing < pack.missing - _ROUNDING:
            pack = other
    return pack.members


def _fitting_from_the_first(sizes: np.ndarray) -> int:
    """How many samples fit one pack, from the first on."""
    return int((np.cumsum(sizes, axis=1) <= 1 + _ROUNDING).all(axis=0).sum())


class _Pack:
    """A pack that is being filled from candidates."""

    def __init__(self, sizes: np.ndarray, max_samples: int, members: Sequence[int]) -> None:
        """
        Args:
            sizes: float64 [2, candidates], shares of the budgets.
            members: candidates that are in it and stay.
        """
        self.sizes = sizes
        self.members = list(members)
        self._num_kept = len(members)
        self._max_samples = max_samples
        self._free = np.ones(sizes.shape[1], dtype=bool)
        self._free[self.members] = False
        self._room = 1 - sizes[:, self.members].sum(axis=1)
        self._mean = np.maximum(sizes.mean(axis=1), _ROUNDING)
        shares = self._mean * min(max_samples, 1 / self._mean.max())
        self._spare = np.where(shares < _LOOSE, 1 - shares, 0.0)  # of the room, to be left free

    @property
    def missing(self) -> float:
        """Shares of the budgets that are to be filled still, or overfilled, together."""
        return float(np.abs(self._room - self._spare).sum())

    def filled(self) -> "_Pack":
        """Itself, after samples were added, then some exchanged for others that fit better."""
        while self._add():
            pass
        for _ in range(_MOST_EXCHANGES):
            if not self._exchange():
                break
            self._add()
        return self

    def _add(self) -> bool:
        """Add the candidate nearest to an even filling of what is left; False if there is none."""
        fits = self._free & (self.sizes <= self._room[:, None] + _ROUNDING).all(axis=0)
        candidates = np.flatnonzero(fits)
        num_more = self._max_samples - len(self.members)
        if not len(candidates) or not num_more:
            return False
        missing = self._room - self._spare
        # As many as the emptier budget asks for: small ones fit beside a large one.
        num_wanted = min(num_more, max(1.0, (missing / self._mean).max()))
        wanted = (missing / num_wanted)[:, None]
        distances = np.abs(wanted - self.sizes[:, candidates]).sum(axis=0)
        best = int(np.argmin(distances))
        if num_wanted == 1 and distances[best] > self.missing:
            return False  # only where a budget is loose: the pack is nearer to its share without
        chosen = int(candidates[best])
        self.members.append(chosen)
        self._free[chosen] = False
        self._room = self._room - self.sizes[:, chosen]
        return True

    def _exchange(self) -> bool:
        """Make the exchange of one member that leaves the least room; False if none helps."""
        free = np.flatnonzero(self._free)
        exchangeable = np.array(self.members[self._num_kept :], dtype=np.int64)
        if not len(free) or not len(exchangeable):
            return False
        without = self._room[:, None] + self.sizes[:, exchangeable]
        rooms = without[:, :, None] - self.sizes[:, None, free]  # [2, members, candidates]
        left = np.abs(rooms - self._spare[:, None, None]).sum(axis=0)
        left[(rooms < -_ROUNDING).any(axis=0)] = np.inf
        member, candidate = np.unravel_index(int(np.argmin(left)), left.shape)
        if left[member, candidate] >= self.missing - _ROUNDING:
            return False
        self._free[exchangeable[member]] = True
        self._free[free[candidate]] = False
        self.members[self._num_kept + int(member)] = int(free[candidate])
        self._room = rooms[:, member, candidate]
        return True


def buffer_size(requested: int, max_samples: int) -> int:
    """Samples looked at together: enough that there is a choice."""
    return max(requested, 2 * max_samples)
