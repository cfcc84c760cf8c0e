"""From records to packs: what runs in the loader processes.

    record --cook--> conversation --encode--> tokens and pixels --pack--> LoadedPack

A sample that cannot be used becomes a RejectedSample and stays in the stream up to the trainer's
process: nothing is lost without being counted, counts need no channel of their own and are as exact
after a resume as the samples are.

No step draws random numbers or remembers anything but the samples in the buffer. So what a resumed
run has to know of a stream is its place (places.py), which every pack brings along. Energon's own
wrappers (MapDataset, PackingDataset) would save and restore each of their steps instead: the state
of a stream was up to 10 s old and could only be gone on with by as many ranks and processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeGuard

import numpy as np

from megatron_dattn.batch import PackedBatch
from megatron_dattn.data.conversation import Conversation, parse_record
from megatron_dattn.data.encoder import SampleEncoder
from megatron_dattn.data.energon import SavableDataset
from megatron_dattn.data.image_files import EmbeddedImages, ImageRoot
from megatron_dattn.data.json_lines import parse_line
from megatron_dattn.data.packing import Budgets, choose_pack
from megatron_dattn.data.problems import FIXED_BY_DEFAULT
from megatron_dattn.data.record_source import RawRecord, RecordSource
from megatron_dattn.data.rejection import Reason, Rejection, SampleError
from megatron_dattn.data.sample import (
    EncodedSample,
    LoadedPack,
    RejectedSample,
    build_batch,
)
from megatron_dattn.data.shard_reader import as_record
from megatron_dattn.data.system_errors import out_of_memory
from megatron_dattn.errors import UserError, quoted, shortened

MAX_KEY_LENGTH = 200  # a file's name and a number make less


@dataclass
class CookedSample:
    """A conversation that is not yet tokenised, and where its images are."""

    key: str
    position: int
    epoch: int
    conversation: Conversation
    image_root: ImageRoot


def cook_record(
    record: RawRecord, fixing: frozenset[Reason] = FIXED_BY_DEFAULT
) -> CookedSample | RejectedSample:
    """Parse and normalise one record's text.

    Args:
        fixing: problems that are fixed where their fix applies.
    """
    key, images = record.key, record.image_root
    try:
        content = parse_line(record.text)
        if isinstance(images, EmbeddedImages):
            content = as_record(content, images)
        own_key = content.get("key") if isinstance(content, dict) else None
        if _is_key(own_key):
            key = own_key
        conversation = parse_record(content, fixing)
    except SampleError as error:
        return RejectedSample(record.position, Rejection(key, error.reason, str(error)))
    return CookedSample(key, record.position, record.epoch, conversation, images)


def _is_key(value: Any) -> TypeGuard[str]:
    """Whether it names a sample in a line of a log; the record's number does otherwise."""
    return isinstance(value, str) and len(value) <= MAX_KEY_LENGTH and value.isprintable()


class VLMTaskEncoder:
    """Encodes and packs; the settings are those of the run."""

    def __init__(
        self, encoder: SampleEncoder, *, max_samples: int, pad_id: int, keep_order: bool
    ) -> None:
        self.encoder = encoder
        self.max_samples = max_samples
        self.pad_id = pad_id
        self.keep_order = keep_order

    def encode_record(self, record: RawRecord) -> EncodedSample | RejectedSample:
        """Make a sample of a record as it is stored."""
        return self.encode_sample(cook_record(record, self.encoder.policies.fixing))

    def encode_sample(
        self, sample: CookedSample | RejectedSample
    ) -> EncodedSample | RejectedSample:
        """Tokenise a conversation and read its images."""
        if isinstance(sample, RejectedSample):
            return sample
        images = sample.conversation.images
        try:
            encoded = self.encoder(sample.conversation, sample.image_root)
        except MemoryError as error:
            work = f"preparing sample {sample.key} with images {quoted(list(images), 200)}"
            raise out_of_memory(work) from error
        except SampleError as error:
            return RejectedSample(sample.position, Rejection(sample.key, error.reason, str(error)))
        return EncodedSample(
            sample.key,
            sample.position,
            sample.epoch,
            input_ids=encoded.input_ids,
            labels=encoded.labels,
            image_offsets=encoded.image_offsets,
            images=encoded.images,
            grid=self.encoder.grid,
            fixed=encoded.fixed,
        )

    def select_samples_to_pack(self, samples: list[EncodedSample | RejectedSample]) -> list[int]:
        """Choose what of the buffer goes out next: the samples of a pack, or a rejected one.

        A rejected sample goes out by itself when it is the oldest, not earlier: at the start of a
        run with many loaders, the rejected samples of whole buffers would be counted against the
        few used ones of the first packs.
        """
        if isinstance(samples[0], RejectedSample):
            return [0]
        usable = [n for n, sample in enumerate(samples) if isinstance(sample, EncodedSample)]
        budgets = Budgets(self.encoder.visual_budget, self.encoder.text_budget, self.max_samples)
        encoded = [sample for sample in samples if isinstance(sample, EncodedSample)]
        chosen = choose_pack(encoded, budgets, keep_order=self.keep_order)
        return [usable[n] for n in chosen]

    def pack_selected_samples(self, samples: list[EncodedSample | RejectedSample]) -> LoadedPack:
        """Build what goes out, of samples that were selected together."""
        encoded = [sample for sample in samples if isinstance(sample, EncodedSample)]
        return LoadedPack(
            batch=self._batch(encoded) if encoded else None,
            rejections=tuple(s.rejection for s in samples if isinstance(s, RejectedSample)),
            fixed=tuple(reason for sample in encoded for reason in sorted(sample.fixed)),
        )

    def _batch(self, samples: list[EncodedSample]) -> PackedBatch:
        try:
            return build_batch(
                samples,
                preprocessor=self.encoder.preprocessor,
                visual_budget=self.encoder.visual_budget,
                text_budget=self.encoder.text_budget,
                pad_id=self.pad_id,
            )
        except MemoryError as error:
            keys = ", ".join(sample.key for sample in samples)
            raise out_of_memory(f"packing samples {shortened(keys, 200)}") from error


class PackStream(SavableDataset):
    """The packs of one stream of records."""

    def __init__(
        self, records: RecordSource, task_encoder: VLMTaskEncoder, *, buffer_size: int
    ) -> None:
        super().__init__(records.worker_config)
        self.records = records
        self.task_encoder = task_encoder
        self.buffer_size = buffer_size

    def __iter__(self) -> Iterator[LoadedPack]:
        try:
            yield from self._packs(self.worker_config.rank_worker_id())
        except UserError as error:
            yield LoadedPack(failure=error)

    def _packs(self, stream: int) -> Iterator[LoadedPack]:
        encoder = self.task_encoder
        samples = (encoder.encode_record(record) for record in self.records)
        buffer: list[EncodedSample | RejectedSample] = []
        num_drawn = 0
        while True:
            new = list(islice(samples, self.buffer_size - len(buffer)))
            num_drawn += len(new)
            buffer += new
            if not buffer:
                return
            chosen = encoder.select_samples_to_pack(buffer)
            pack = encoder.pack_selected_samples([buffer[number] for number in chosen])
            buffer = [sample for n, sample in enumerate(buffer) if n not in set(chosen)]
            waiting = np.array([sample.position for sample in buffer], dtype=np.int64)
            yield replace(pack, stream=stream, num_drawn=num_drawn, waiting=waiting)

    def len_worker(self, worker_idx: int | None = None) -> int:
        return self.records.len_worker(worker_idx)

    def worker_has_samples(self) -> bool:
        return True

    def reset_state_own(self) -> None: ...

    def config(self) -> dict[str, Any]:
        return {"type": type(self).__qualname__, "records": self.records.config()}
