"""The places of a rank's streams from a state of Energon's, as older versions stored it.

Such a state may be some packs behind the pack that was given out last: a loader process kept one
every ten seconds, and the trainer noted how many packs to pass over since. They are found again as
they were made then: by first fit over a buffer, whose newest pack was kept back for the next one.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_dattn.data.places import StreamPlace
from megatron_dattn.data.record_source import TrainingRecords
from megatron_dattn.data.sample import EncodedSample
from megatron_dattn.data.task_encoder import VLMTaskEncoder


def places_from_energon(
    saved: Any, records: TrainingRecords, task_encoder: VLMTaskEncoder, buffer_size: int
) -> list[StreamPlace]:
    """The places of a rank's streams, the one that gives the next pack first.

    Args:
        saved: Energon's SavableDataLoaderState, or None of a loader that had not begun.
        records: of the rank, at its first places.
        buffer_size: samples that the older version looked at together.
    """
    if saved is None:
        return records.places
    older = _OlderPacking(records, task_encoder, buffer_size)
    places = [
        older.place(state, first)
        for state, first in zip(saved.worker_states, records.places, strict=True)
    ]
    return places[saved.next_worker_id :] + places[: saved.next_worker_id]


@dataclass(frozen=True)
class _OlderPacking:
    records: TrainingRecords
    task_encoder: VLMTaskEncoder
    buffer_size: int

    def place(self, state: Any, first: StreamPlace) -> StreamPlace:
        """The place of a stream after the packs that are to be passed over."""
        num_passed = 0
        if hasattr(state, "offset"):  # of a loader process
            num_passed, state = state.offset, state.state and state.state.dataset_state
        planned, place = _planned(state, first) if state is not None else ([], first)
        for _ in range(num_passed):
            if not planned:
                planned = self._packs(place.positions(0, self.buffer_size))
                kept_back = planned.pop() if len(planned) > 1 else []
                place = place.after(self.buffer_size, np.array(kept_back, np.int64))
            del planned[0]
        rest = [position for pack in planned for position in pack]
        # In the order in which the stream drew them: an epoch is shown to its end.
        named = np.sort(np.concatenate([np.array(rest, np.int64), place.ahead]))
        return StreamPlace(named, place.next, place.step)

    def _packs(self, positions: np.ndarray) -> list[list[int]]:
        """The positions of a buffer by pack; every rejected one by itself, at its share."""
        encode = self.task_encoder.encode_record
        samples = [encode(record) for record in self.records.at(positions)]
        packs = self._first_fit([s for s in samples if isinstance(s, EncodedSample)])
        places = [
            ((number + 1) / len(packs), [sample.position for sample in pack])
            for number, pack in enumerate(packs)
        ]
        places += [
            (number / len(samples), [sample.position])
            for number, sample in enumerate(samples)
            if not isinstance(sample, EncodedSample)
        ]
        return [pack for _, pack in sorted(places, key=lambda entry: entry[0])]

    def _first_fit(self, samples: list[EncodedSample]) -> list[list[EncodedSample]]:
        packs: list[list[EncodedSample]] = []
        num_closed = 0  # packs that hold samples of an earlier epoch, but for the newest
        epochs = [sample.epoch for sample in samples[:1] + samples]
        for sample, (former, epoch) in zip(samples, pairwise(epochs), strict=True):
            if epoch != former:
                num_closed = max(0, len(packs) - 1)
            pack = next((p for p in packs[num_closed:] if self._fits([*p, sample])), None)
            if pack is None:
                packs.append([sample])
            else:
                pack.append(sample)
        return packs

    def _fits(self, pack: list[EncodedSample]) -> bool:
        encoder = self.task_encoder.encoder
        return (
            len(pack) <= self.task_encoder.max_samples
            and sum(sample.num_visual_tokens for sample in pack) <= encoder.visual_budget
            and sum(sample.num_text_tokens for sample in pack) <= encoder.text_budget
        )


def _planned(state: Any, first: StreamPlace) -> tuple[list[list[int]], StreamPlace]:
    """The positions of packs that were chosen but not given out, and the place after them."""
    packing = state
    while "_pre_packing_lengths" not in packing:  # within what watches and collects garbage
        (packing,) = packing["datasets"]
    source = packing
    while "_taken" not in source:
        (source,) = source["datasets"]
    ends = np.cumsum([0, *packing["_pre_packing_lengths"]]).tolist()
    chosen = _positions(packing["_pre_packing_buffer"])
    planned = [chosen[start:end] for start, end in pairwise(ends)]
    waiting = np.array(_positions(packing["_reading_buffer"]), np.int64)
    return planned, first.after(source["_taken"], waiting)


def _positions(buffer: Any) -> list[int]:
    return [key[-1] for key in buffer["_restore_keys"]]
