"""The task encoder: what Energon calls in its workers.

    record --cook--> conversation --encode--> tokens and pixels --pack--> LoadedPack

A sample that cannot be used becomes a RejectedSample and stays in the stream up to the trainer's
process: nothing is lost without being counted, counts need no channel of their own and are as exact
after a resume as the samples are.

No step draws random numbers, so `@stateless` does without restoring seeds, which would save and
set three random number generators per sample.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

from megatron_dattn.batch import PackedBatch
from megatron_dattn.data.conversation import Conversation, parse_record
from megatron_dattn.data.encoder import SampleEncoder
from megatron_dattn.data.energon import MapDataset, PackingDataset, TaskEncoder, stateless
from megatron_dattn.data.image_files import EmbeddedImages, ImageRoot
from megatron_dattn.data.packing import pack_samples
from megatron_dattn.data.record_source import RecordSource
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

    __key__: str
    __restore_key__: tuple[Any, ...]
    conversation: Conversation
    image_root: ImageRoot
    epoch: int


@stateless
def cook_record(sample: dict[str, Any]) -> CookedSample | RejectedSample:
    """Parse and normalise one record's text."""
    key, restore_key = sample["__key__"], sample["__restore_key__"]
    try:
        record, images = _parse_json(sample["json"]), sample["image_root"]
        if isinstance(images, EmbeddedImages):
            record = as_record(record, images)
        own_key = record.get("key") if isinstance(record, dict) else None
        if _is_key(own_key):
            key = own_key
        conversation = parse_record(record)
    except SampleError as error:
        return RejectedSample(key, restore_key, Rejection(key, error.reason, str(error)))
    return CookedSample(key, restore_key, conversation, images, sample["epoch"])


def _is_key(value: Any) -> TypeGuard[str]:
    """Whether it names a sample in a line of a log; the record's number does otherwise."""
    return isinstance(value, str) and len(value) <= MAX_KEY_LENGTH and value.isprintable()


def _parse_json(line: bytes | SampleError) -> Any:
    if isinstance(line, SampleError):
        raise line
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SampleError(Reason.BAD_RECORD, f"the line is not valid JSON: {error}") from error


class VLMTaskEncoder(TaskEncoder):
    """Encodes and packs; the settings are those of the run."""

    def __init__(
        self, encoder: SampleEncoder, *, max_samples: int, pad_id: int, keep_order: bool
    ) -> None:
        self.encoder = encoder
        self.max_samples = max_samples
        self.pad_id = pad_id
        self.keep_order = keep_order

    @stateless
    def encode_sample(
        self, sample: CookedSample | RejectedSample
    ) -> EncodedSample | RejectedSample:
        if isinstance(sample, RejectedSample):
            return sample
        key, restore_key = sample.__key__, sample.__restore_key__
        images = sample.conversation.images
        try:
            encoded = self.encoder(sample.conversation, sample.image_root)
        except MemoryError as error:
            work = f"preparing sample {key} with images {quoted(list(images), 200)}"
            raise out_of_memory(work) from error
        except SampleError as error:
            return RejectedSample(key, restore_key, Rejection(key, error.reason, str(error)))
        return EncodedSample(
            key,
            restore_key,
            input_ids=encoded.input_ids,
            labels=encoded.labels,
            image_offsets=encoded.image_offsets,
            images=encoded.images,
            grid=self.encoder.grid,
            epoch=sample.epoch,
        )

    def build_chain(self, records: RecordSource, *, packing_buffer_size: int) -> PackingDataset:
        """Everything from records to packs, as data sets around each other."""
        workers = records.worker_config
        cooked = MapDataset(records, cook_record, stateless_map_fn=True, worker_config=workers)
        encoded = self.build_encode_sample(cooked, worker_config=workers)
        return CarryingPacking(
            encoded,
            buffer_size=packing_buffer_size,
            pre_packer=self.select_samples_to_pack,
            final_packer=self.pack_selected_samples,
            final_packer_stateless=True,
            sample_encoder_stateless=True,
            worker_config=workers,
        )

    def select_samples_to_pack(
        self, samples: list[EncodedSample | RejectedSample]
    ) -> list[list[EncodedSample | RejectedSample]]:
        """Packs of a buffer; every rejected sample has one to itself, at its share of the way.

        Together in front they would be counted early: at the start of a run with many loaders, the
        rejected samples of whole buffers against the few used ones of the first packs.

        A state remembers which samples share a pack and a resumed run encodes them anew. Should a
        sample have been repaired in between, it must not find its pack full.
        """
        encoded = [sample for sample in samples if isinstance(sample, EncodedSample)]
        chosen = pack_samples(
            encoded,
            visual_budget=self.encoder.visual_budget,
            text_budget=self.encoder.text_budget,
            max_samples=self.max_samples,
            keep_order=self.keep_order,
        )
        # By their share of the way. The last pack may be kept back to be filled up: it is one of
        # samples, as a rejected one is less than the whole way along.
        places: list[tuple[float, list[EncodedSample | RejectedSample]]] = [
            ((number + 1) / len(chosen), [encoded[index] for index in pack])
            for number, pack in enumerate(chosen)
        ]
        places += [
            (place / len(samples), [sample])
            for place, sample in enumerate(samples)
            if isinstance(sample, RejectedSample)
        ]
        return [pack for _, pack in sorted(places, key=lambda entry: entry[0])]

    @stateless
    def pack_selected_samples(self, samples: list[EncodedSample | RejectedSample]) -> LoadedPack:
        encoded = [sample for sample in samples if isinstance(sample, EncodedSample)]
        batch = None
        if encoded:
            batch = self._batch(encoded)
        return LoadedPack(
            __key__=",".join(sample.__key__ for sample in samples),
            __restore_key__=(),
            batch=batch,
            rejections=tuple(s.rejection for s in samples if isinstance(s, RejectedSample)),
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
            keys = ", ".join(sample.__key__ for sample in samples)
            raise out_of_memory(f"packing samples {shortened(keys, 200)}") from error


class CarryingPacking(PackingDataset):
    """Packing that keeps the newest pack of a buffer back, to be filled from the next buffer.

    Energon empties its buffer into packs before it reads on, which leaves every buffer's last pack
    short. Samples that are kept back return to the reading buffer, whose content is part of the
    saved state.
    """

    def __init__(self, dataset: Any, *, pre_packer: Any, **options: Any) -> None:
        super().__init__(dataset, pre_packer=self._select, **options)
        self._select_packs = pre_packer

    def __iter__(self) -> Iterator[LoadedPack]:
        try:
            yield from super().__iter__()
        except UserError as error:
            yield LoadedPack("", (), batch=None, rejections=(), failure=error)

    def _select(self, samples: list[Any]) -> list[list[Any]]:
        packs = self._select_packs(samples)
        # The buffer is only ever short at the end of the data, where nothing comes to fill a pack.
        if len(samples) == self.buffer_size and len(packs) > 1:
            self._reading_buffer.extend(packs.pop())
        return packs

    def _fill_reading_buffer(self, source_iter: Any, log_progress: bool = False) -> bool:
        # Without the progress bar per worker.
        return super()._fill_reading_buffer(source_iter, log_progress=False)
