"""The data loader of one data-parallel rank: an iterable of PackedBatch.

Training data is endless: epochs that show every record of every file once (a file with a weight, as
often as that says), each in another order. Validation data comes once, in order. Two loaders with
the same data, settings and seed give the same batches, and a loader that is restored goes on with
the very batch that would have come next.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_dattn.batch import PackedBatch
from megatron_dattn.data.config import DataConfig, DatasetConfig
from megatron_dattn.data.dataset import PreparedDataset, open_dataset
from megatron_dattn.data.encoder import ModelSizes, sample_encoder
from megatron_dattn.data.energon import WorkerConfig, reraise_exception
from megatron_dattn.data.epochs import records_per_epoch
from megatron_dattn.data.loader_state import (
    ENERGONS_VERSION,
    RANK,
    RANKS,
    STATE_VERSION,
    WORKERS,
    dump_state,
    load_state,
    make_state,
    places_of,
)
from megatron_dattn.data.older_loader_state import places_from_energon
from megatron_dattn.data.packing import buffer_size
from megatron_dattn.data.places import StreamPlace
from megatron_dattn.data.problems import FIXED_BY_DEFAULT, LENGTH_PROBLEMS
from megatron_dattn.data.record_source import (
    RecordSource,
    TrainingRecords,
    ValidationRecords,
)
from megatron_dattn.data.rejection import Reason, Rejection
from megatron_dattn.data.sample import LoadedPack
from megatron_dattn.data.skipped_samples import LoaderCounters, count_pack, most_in_a_row
from megatron_dattn.data.task_encoder import PackStream, VLMTaskEncoder
from megatron_dattn.data.workers import WatchedLoader, watched_loader
from megatron_dattn.errors import CheckpointError, ConfigError, DataError

_POLICIES = "data.policies that fix or do not fix"
_OLDER = {"data.video_frames": DataConfig.video_frames, _POLICIES: []}  # in states without them

logger = logging.getLogger(__name__)


def build_loader(
    config: DataConfig,
    *,
    datasets: Sequence[DatasetConfig],
    sizes: ModelSizes,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    seed: int,
    training: bool,
    packs_per_step: int = 1,
) -> "VLMLoader":
    """Build the loader of one data-parallel rank.

    Args:
        datasets: `config.train` or `config.validation`.
        sizes: the model's, whose inputs the samples become.
        micro_batch_size: the most samples in one pack.
        training: endless and shuffled; otherwise every sample once, in order.
        packs_per_step: are taken together; loader processes make as many ahead.

    Raises:
        ConfigError: settings that do not fit each other.
        DataError: a data set that is missing or not prepared.
    """
    if not datasets:
        raise ConfigError(f"data.{'train' if training else 'validation'} names no data set")
    opened = [open_dataset(dataset) for dataset in datasets]
    workers = WorkerConfig(
        rank=data_parallel_rank,
        world_size=data_parallel_size,
        # Validation is short and starts anew each time: forking workers would take longer.
        num_workers=config.num_workers if training else 0,
        seed_offset=seed,
        global_error_handler=reraise_exception,
    )
    encoder, pad_id = sample_encoder(config, sizes)
    task_encoder = VLMTaskEncoder(
        encoder, max_samples=micro_batch_size, pad_id=pad_id, keep_order=not training
    )
    if training and data_parallel_rank == 0:
        _describe(config, opened)
    source = _PackSource(config, opened, workers, task_encoder, seed, training, packs_per_step)
    return VLMLoader(source, _identity(config, source, micro_batch_size, seed))


def _describe(config: DataConfig, datasets: Sequence[PreparedDataset]) -> None:
    """Say what an epoch consists of: a mixture that nobody meant trains without an error."""
    if config.shuffle_buffer_size is not None:
        logger.warning(
            "data.shuffle_buffer_size %d has no effect: every epoch is shuffled as a whole; leave "
            "it out",
            config.shuffle_buffer_size,
        )
    shown = [records_per_epoch(dataset.num_samples, dataset.weight) for dataset in datasets]
    for dataset, number in zip(datasets, shown, strict=True):
        logger.info(
            "training data %s: %d records, weight %g: %d of %d in an epoch, %.1f %%",
            dataset.path,
            dataset.num_samples,
            dataset.weight,
            number,
            sum(shown),
            100 * number / sum(shown),
        )


class VLMLoader:
    """Iterable of PackedBatch with an exact state and counters.

    While training, all iterators are the same endless one. A validation loader starts from its
    first sample with every `iter()`.
    """

    def __init__(self, source: "_PackSource", identity: dict[str, Any]) -> None:
        self._source = source
        self._identity = identity
        self._counters = LoaderCounters()
        self._training = source.training
        self._records = source.records()
        self._loader = self._new_loader() if self._training else None
        self._endless: Iterator[PackedBatch] | None = None
        self._last: dict[int, LoadedPack] = {}  # of each stream, without its batch
        self._next_stream = 0

    def _new_loader(self) -> WatchedLoader:
        return self._source.loader(self._records)

    def __iter__(self) -> Iterator[PackedBatch]:
        if self._loader is None:
            self._counters = LoaderCounters()
            return self._batches(self._new_loader())
        if self._endless is None:
            self._endless = self._batches(self._loader)
        return self._endless

    def counters(self) -> LoaderCounters:
        """Samples seen and skipped so far (of a validation loader: since its last `iter()`)."""
        return self._counters.copy()

    def save_state(self) -> bytes:
        """The place of the loader after the batch that was given out last; no worker is asked."""
        return dump_state(make_state(self._identity, self._counters, self._places()))

    def _places(self) -> list[StreamPlace]:
        """The places of the streams, the one that gives the next pack first."""
        places = list(self._training_records().places)
        for stream, pack in self._last.items():
            places[stream] = places[stream].after(pack.num_drawn, pack.waiting)
        return places[self._next_stream :] + places[: self._next_stream]

    def restore_state(self, data: bytes) -> None:
        """Continue where `save_state` was called; to be called before iterating.

        Raises:
            CheckpointError: the state is damaged, or was saved with other data or settings.
        """
        records = self._training_records()
        if self._endless is not None:
            raise RuntimeError("restore_state must be called before the loader is iterated")
        state = load_state(data)
        version = state.get("version") if isinstance(state, dict) else None
        if version not in (STATE_VERSION, ENERGONS_VERSION):
            raise CheckpointError(
                "the data loader's state was saved by a version that ordered samples differently; "
                "resume with that version, or start the stage anew from these weights with "
                "checkpoint.load"
            )
        _require_same({**_OLDER, **state["identity"]}, self._identity)
        self._counters = LoaderCounters(**state["counters"])
        if version == STATE_VERSION:
            records.places = places_of(state)
        else:
            looked_at = state["identity"]["data.packing_buffer_size"]
            records.places = places_from_energon(
                state["energon"], records, self._source.task_encoder, looked_at
            )

    def _batches(self, loader: Any) -> Iterator[PackedBatch]:
        pack: LoadedPack
        failing, in_a_row = self._source.task_encoder.encoder.policies.failing, 0
        for pack in loader:
            if pack.failure is not None:
                raise pack.failure
            self._last[pack.stream] = replace(pack, batch=None)
            self._next_stream = (pack.stream + 1) % max(1, self._source.workers.num_workers)
            used = pack.batch.num_samples if pack.batch is not None else 0
            count_pack(self._counters, used, pack.rejections, pack.fixed, failing=failing)
            if pack.batch is not None:
                in_a_row = 0
                yield pack.batch
            elif self._training:
                in_a_row += len(pack.rejections)
                self._require_end_of_search(in_a_row, pack.rejections[-1])

    def _require_end_of_search(self, in_a_row: int, last: Rejection) -> None:
        """Training data has no end at which a search for a usable sample would stop by itself."""
        if in_a_row >= most_in_a_row(self._source.config.max_skipped_fraction):
            raise DataError(
                f"data-parallel rank {self._source.workers.rank} met {in_a_row} samples in a row "
                f"that cannot be used, the last one {last.key} ({last.reason}): {last.message}; "
                "tools/check_data.py lists what is wrong with a data set"
            )

    def _training_records(self) -> TrainingRecords:
        if not isinstance(self._records, TrainingRecords):
            raise RuntimeError("a validation loader has no state: every iteration starts anew")
        return self._records


@dataclass(frozen=True)
class _PackSource:
    """Makes what the loader consists of."""

    config: DataConfig
    datasets: list[PreparedDataset]
    workers: WorkerConfig
    task_encoder: VLMTaskEncoder
    seed: int
    training: bool
    packs_per_step: int

    def records(self) -> TrainingRecords | ValidationRecords:
        if self.training:
            return TrainingRecords(self.datasets, self.workers, self.seed)
        return ValidationRecords(self.datasets, self.workers)

    def loader(self, records: RecordSource) -> WatchedLoader:
        size = buffer_size(self.config.packing_buffer_size, self.task_encoder.max_samples)
        stream = PackStream(records, self.task_encoder, buffer_size=size)
        timeout = self.config.worker_timeout_seconds or None
        return watched_loader(stream, timeout, packs_at_a_time=self.packs_per_step)


def _identity(
    config: DataConfig, source: _PackSource, micro_batch_size: int, seed: int
) -> dict[str, Any]:
    """What must be the same for a state to mean the same samples."""
    return {
        RANK: source.workers.rank,
        RANKS: source.workers.world_size,
        WORKERS: config.num_workers,
        "data.visual_budget": config.visual_budget,
        "data.text_budget": config.text_budget,
        "data.template": source.task_encoder.encoder.tokenizer.identity,
        "data.long_samples": config.long_samples,
        "data.image_fit": source.task_encoder.encoder.preprocessor.resolutions,
        "data.max_images_per_sample": config.max_images_per_sample,
        "data.video_frames": config.video_frames,
        # A sample that is fixed takes its place in a pack; the difference only, as older states
        # know of no policies.
        _POLICIES: [
            str(reason)
            for reason in Reason
            if reason in config.resolved_policies.fixing - LENGTH_PROBLEMS ^ FIXED_BY_DEFAULT
        ],
        "training.micro_batch_size": micro_batch_size,
        "training.seed": seed,
        "data sets": [(dataset.fingerprint, dataset.weight) for dataset in source.datasets],
    }


def _require_same(saved: dict[str, Any], current: dict[str, Any]) -> None:
    for name, value in current.items():
        if saved.get(name) == value:
            continue
        if name == "data sets":
            raise CheckpointError(
                "the data loader's state belongs to other data sets (or weights) than "
                "data.train names now; use the data it was saved with"
            )
        raise CheckpointError(
            f"the data loader's state was saved with {name} {saved.get(name)}, but it is {value} "
            "now; the stream of samples would not be the same"
        )
