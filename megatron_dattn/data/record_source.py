"""The records of prepared data as Energon's data sets: endless and shuffled, or once and in order.

Records stay undecoded here, so that bad ones can be counted. Energon's own reader of JSON lines
deals each worker one stretch of the file, blends files by drawing lots and shuffles in a buffer
that crosses the ends of epochs: some records would be shown twice before others were shown at all.
Both layouts are Energon's, and give the same records in the same order.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_dattn.data.dataset import PreparedDataset
from megatron_dattn.data.energon import SavableDataset, WorkerConfig
from megatron_dattn.data.epochs import EpochOrder
from megatron_dattn.data.image_files import ImageRoot
from megatron_dattn.data.json_lines import JsonLines
from megatron_dattn.data.places import first_places
from megatron_dattn.data.rejection import SampleError
from megatron_dattn.data.shard_reader import ShardReader

_AT_A_TIME = 128  # records whose order is computed together


@dataclass(frozen=True)
class RawRecord:
    """One record as it is stored."""

    key: str
    position: int
    """In the sequence that all streams share."""
    epoch: int
    text: bytes | SampleError
    """Its JSON, or why there is none to be parsed: that is counted where samples are made."""
    image_root: ImageRoot


class RecordSource(SavableDataset):
    """Reads records; the subclasses say which."""

    def __init__(self, datasets: Sequence[PreparedDataset], worker_config: WorkerConfig) -> None:
        super().__init__(worker_config)
        self.datasets = datasets
        self._readers = [_reader(dataset) for dataset in datasets]

    @abstractmethod
    def __iter__(self) -> Iterator[RawRecord]: ...

    def len_worker(self, worker_idx: int | None = None) -> int:
        workers = self.worker_config
        num_streams = workers.world_size * max(1, workers.num_workers)
        return sum(dataset.num_samples for dataset in self.datasets) // num_streams

    def worker_has_samples(self) -> bool:
        return True

    def reset_state_own(self) -> None: ...

    def config(self) -> dict[str, Any]:
        return {"type": type(self).__qualname__, "worker_config": self.worker_config.config()}

    def _record(self, file: int, record: int, *, position: int, epoch: int) -> RawRecord:
        dataset = self.datasets[file]
        text: bytes | SampleError
        images: ImageRoot = str(dataset.image_root)
        try:
            found = self._readers[file][record]
            text = found if isinstance(found, bytes) else found.text
            images = images if isinstance(found, bytes) else found.images
        except SampleError as error:
            text = error
        return RawRecord(
            key=f"{dataset.name}-{record:09d}",
            position=position,
            epoch=epoch,
            text=text,
            image_root=images,
        )


def _reader(dataset: PreparedDataset) -> JsonLines | ShardReader:
    if dataset.shards is not None:
        return ShardReader(dataset.shards)
    return JsonLines(dataset.path, dataset.num_samples)


class TrainingRecords(RecordSource):
    """An endless sequence of epochs, shared by the streams of all data-parallel ranks."""

    def __init__(
        self, datasets: Sequence[PreparedDataset], worker_config: WorkerConfig, seed: int
    ) -> None:
        super().__init__(datasets, worker_config)
        self.order = EpochOrder.of(
            [dataset.num_samples for dataset in datasets],
            [dataset.weight for dataset in datasets],
            seed,
        )
        self.places = first_places(
            worker_config.rank, worker_config.world_size, worker_config.num_workers
        )
        """Where this rank's streams begin; to be changed before the loader processes start."""

    def __iter__(self) -> Iterator[RawRecord]:
        place, drawn = self.places[self.worker_config.rank_worker_id()], 0
        while True:
            yield from self.at(place.positions(drawn, _AT_A_TIME))
            drawn += _AT_A_TIME

    def at(self, positions: np.ndarray) -> Iterator[RawRecord]:
        """The records at int64 positions of the sequence."""
        records = self.order.records(positions)
        columns = np.stack([records.files, records.numbers, positions], axis=1).tolist()
        for file, record, position in columns:
            yield self._record(file, record, position=position, epoch=self.order.epoch(position))


class ValidationRecords(RecordSource):
    """This rank's share of all records, once and in order: neighbouring records stay together."""

    def __iter__(self) -> Iterator[RawRecord]:
        ends = np.cumsum([dataset.num_samples for dataset in self.datasets])
        total, workers = int(ends[-1]), self.worker_config
        assert workers.num_workers == 0, "validation loads in the trainer's process"
        start, stop = (
            rank * total // workers.world_size for rank in (workers.rank, workers.rank + 1)
        )
        for position in range(start, stop):
            file = int(np.searchsorted(ends, position, side="right"))
            record = position - int(ends[file]) + self.datasets[file].num_samples
            yield self._record(file, record, position=position, epoch=0)
