"""Which samples share a pack: first fit over a buffer of samples.

A pack is full when its visual tokens, its text tokens or its number of samples are used up. First
fit keeps the samples' order as far as it can, so that a shuffled stream stays shuffled (sorting by
size would fill slightly better and put all long samples together). Where an epoch ends, the pack
that its last samples began is filled up by the next epoch's first ones, and no earlier pack is:
packs give out an epoch to its last sample before they give out another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Sized(Protocol):
    """Anything with token counts."""

    @property
    def num_visual_tokens(self) -> int: ...

    @property
    def num_text_tokens(self) -> int: ...

    @property
    def epoch(self) -> int: ...


@dataclass
class _OpenPack:
    visual_room: int
    text_room: int
    sample_room: int
    members: list[int] = field(default_factory=list)

    def takes(self, sample: Sized) -> bool:
        return (
            self.sample_room > 0
            and sample.num_visual_tokens <= self.visual_room
            and sample.num_text_tokens <= self.text_room
        )

    def add(self, index: int, sample: Sized) -> None:
        self.visual_room -= sample.num_visual_tokens
        self.text_room -= sample.num_text_tokens
        self.sample_room -= 1
        self.members.append(index)


def pack_samples(
    samples: Sequence[Sized],
    *,
    visual_budget: int,
    text_budget: int,
    max_samples: int,
    keep_order: bool = False,
) -> list[list[int]]:
    """Distribute samples over packs; every index comes back exactly once.

    Args:
        keep_order: only ever add to the newest pack, so that the packs read one after the other
            give the samples in their order.

    Raises:
        ValueError: a sample does not fit an empty pack.
    """
    packs: list[_OpenPack] = []
    num_closed = 0  # packs that hold samples of an earlier epoch, but for the newest
    for index, sample in enumerate(samples):
        if keep_order or (index and sample.epoch != samples[index - 1].epoch):
            num_closed = max(0, len(packs) - 1)
        candidates = packs[num_closed:]
        pack = next((pack for pack in candidates if pack.takes(sample)), None)
        if pack is None:
            pack = _OpenPack(visual_budget, text_budget, max_samples)
            if not pack.takes(sample):
                raise ValueError(
                    f"sample {index} has {sample.num_visual_tokens} visual and "
                    f"{sample.num_text_tokens} text tokens; the budgets are {visual_budget} and "
                    f"{text_budget}"
                )
            packs.append(pack)
        pack.add(index, sample)
    return [pack.members for pack in packs]


def buffer_size(requested: int, max_samples: int) -> int:
    """Samples looked at together: enough that one pack can be given out and one kept back."""
    return max(requested, 2 * max_samples)
