"""The records of prepared data as Energon's data sets: endless and shuffled, or once and in order.

Records stay undecoded here, so that bad ones can be counted. Energon's own reader of JSON lines
deals each worker one stretch of the file, blends files by drawing lots and shuffles in a buffer
that crosses the ends of epochs: some records would be shown twice before others were shown at all.
Both layouts are Energon's, and give the same records in the same order.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_dattn.data.dataset import PreparedDataset
from megatron_dattn.data.energon import CrudeSample, SavableDataset, WorkerConfig
from megatron_dattn.data.epochs import EpochOrder
from megatron_dattn.data.image_files import ImageRoot
from megatron_dattn.data.json_lines import JsonLines
from megatron_dattn.data.rejection import SampleError
from megatron_dattn.data.shard_reader import ShardReader

_KIND = "Row"  # stored in the loader's state, so it keeps its name
_AT_A_TIME = 128  # records whose order is computed together


class RecordSource(SavableDataset):
    """Reads records; the subclasses say which."""

    def __init__(self, datasets: Sequence[PreparedDataset], worker_config: WorkerConfig) -> None:
        super().__init__(worker_config)
        self.datasets = datasets
        self._readers = [_reader(dataset) for dataset in datasets]

    @abstractmethod
    def __iter__(self) -> Iterator[CrudeSample]: ...

    def len_worker(self, worker_idx: int | None = None) -> int:
        return sum(dataset.num_samples for dataset in self.datasets) // self.num_streams

    def worker_has_samples(self) -> bool:
        return True

    def reset_state_own(self) -> None: ...

    def config(self) -> dict[str, Any]:
        return {"type": type(self).__qualname__, "worker_config": self.worker_config.config()}

    @property
    def num_streams(self) -> int:
        """Processes that share the records: the loader workers of all data-parallel ranks."""
        return self.worker_config.world_size * max(1, self.worker_config.num_workers)

    def _sample(self, file: int, record: int, *, position: int, epoch: int) -> CrudeSample:
        dataset = self.datasets[file]
        text: bytes | SampleError
        images: ImageRoot = str(dataset.image_root)
        try:
            found = self._readers[file][record]
            text = found if isinstance(found, bytes) else found.text
            images = images if isinstance(found, bytes) else found.images
        except SampleError as error:  # counted where samples are made
            text = error
        return CrudeSample(
            __key__=f"{dataset.name}-{record:09d}",
            __restore_key__=(_KIND, position),
            json=text,
            image_root=images,
            epoch=epoch,
        )


def _reader(dataset: PreparedDataset) -> JsonLines | ShardReader:
    if dataset.shards is not None:
        return ShardReader(dataset.shards)
    return JsonLines(dataset.path, dataset.num_samples)


class TrainingRecords(RecordSource):
    """This worker's share of an endless sequence of epochs."""

    _savable_fields = ("_taken",)

    def __init__(
        self, datasets: Sequence[PreparedDataset], worker_config: WorkerConfig, seed: int
    ) -> None:
        super().__init__(datasets, worker_config)
        self.order = EpochOrder.of(
            [dataset.num_samples for dataset in datasets],
            [dataset.weight for dataset in datasets],
            seed,
        )
        self._taken = 0  # records that this worker has given out

    def reset_state_own(self) -> None:
        self._taken = 0

    def __iter__(self) -> Iterator[CrudeSample]:
        while True:
            first = self._stream() + self._taken * self.num_streams
            for sample in self._samples(first, _AT_A_TIME):
                self._taken += 1
                yield sample

    def _stream(self) -> int:
        workers = self.worker_config
        return workers.rank * max(1, workers.num_workers) + workers.rank_worker_id()

    def _samples(self, first: int, count: int) -> Iterator[CrudeSample]:
        records = self.order.records(first, self.num_streams, count)
        columns = np.stack([records.files, records.numbers, records.positions], axis=1).tolist()
        for file, record, position in columns:
            yield self._sample(file, record, position=position, epoch=self.order.epoch(position))

    def can_restore_sample(self) -> bool:
        return True

    def restore_sample(self, restore_key: tuple[Any, ...]) -> CrudeSample:
        kind, position = restore_key
        assert kind == _KIND
        return next(self._samples(position, 1))


class ValidationRecords(RecordSource):
    """This rank's share of all records, once and in order: neighbouring records stay together."""

    def __iter__(self) -> Iterator[CrudeSample]:
        ends = np.cumsum([dataset.num_samples for dataset in self.datasets])
        total, workers = int(ends[-1]), self.worker_config
        assert workers.num_workers == 0, "validation loads in the trainer's process"
        start, stop = (
            rank * total // workers.world_size for rank in (workers.rank, workers.rank + 1)
        )
        for position in range(start, stop):
            file = int(np.searchsorted(ends, position, side="right"))
            record = position - int(ends[file]) + self.datasets[file].num_samples
            yield self._sample(file, record, position=position, epoch=0)
