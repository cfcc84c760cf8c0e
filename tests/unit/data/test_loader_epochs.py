"""What a loader shows in an epoch: every record once, over all ranks, workers and packs."""

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.data.loader import VLMLoader
from tests.unit.data.builders import data_config, make_dataset, make_loader, make_records

NUM_EPOCHS = 3


def streams(loader: VLMLoader, num_workers: int, count: int) -> list[list[str]]:
    """The first `count` or more samples of each worker, which take turns with their packs."""
    shown: list[list[str]] = [[] for _ in range(max(1, num_workers))]
    for number, batch in enumerate(loader):
        shown[number % len(shown)] += batch.sample_keys
        if min(map(len, shown)) >= count:
            return shown
    raise AssertionError("training data has no end")


@pytest.mark.parametrize(
    ("num_records", "num_workers", "num_ranks"), [(4, 0, 1), (61, 0, 1), (61, 2, 2), (4, 2, 3)]
)
def test_every_epoch_is_whole(
    processor: Path, tmp_path: Path, num_records: int, num_workers: int, num_ranks: int
) -> None:
    """Of each stream, the samples up to an epoch's end come before those of the next epoch."""
    dataset = make_dataset(tmp_path, make_records(tmp_path, num_records))
    config = data_config(processor, num_workers=num_workers)
    num_streams = num_ranks * max(1, num_workers)
    all_streams: list[list[str]] = []
    for rank in range(num_ranks):
        loader = make_loader(
            config, [dataset], data_parallel_rank=rank, data_parallel_size=num_ranks
        )
        count = -(-NUM_EPOCHS * num_records // num_streams)
        all_streams += streams(loader, num_workers, count)
    orders = []
    for epoch in range(NUM_EPOCHS):
        shown: list[str] = []
        for number, keys in enumerate(all_streams):
            start, stop = (
                len(range(number, e * num_records, num_streams)) for e in (epoch, epoch + 1)
            )
            shown += keys[start:stop]
        assert sorted(shown) == [f"set-{record:09d}" for record in range(num_records)]
        orders.append(tuple(shown))
    assert len(set(orders)) > 1


def test_files_are_shown_by_their_records_and_weights(processor: Path, tmp_path: Path) -> None:
    big = make_dataset(tmp_path, make_records(tmp_path, 40), name="big")
    small = make_dataset(tmp_path, make_records(tmp_path, 4), name="small")
    for weight, shown in ((1.0, 4), (2.5, 10), (0.5, 2)):
        datasets = [big, DatasetConfig(small.path, weight=weight)]
        loader = make_loader(data_config(processor), datasets)
        (keys,) = streams(loader, 0, 2 * (40 + shown))
        for epoch in (0, 1):
            counts = Counter(keys[epoch * (40 + shown) : (epoch + 1) * (40 + shown)])
            by_file = Counter(key.split("-")[0] for key in counts.elements())
            assert by_file == {"big": 40, "small": shown}
            assert {n for key, n in counts.items() if key.startswith("big")} == {1}


def test_a_state_in_the_middle_of_an_epoch_goes_on_with_its_rest(
    processor: Path, tmp_path: Path
) -> None:
    dataset = make_dataset(tmp_path, make_records(tmp_path, 30))
    loader = make_loader(data_config(processor), [dataset])
    shown: list[str] = []
    for _ in range(12):  # packs of about four: one and a half epochs
        shown += next(iter(loader)).sample_keys
        state = loader.save_state()
        loader = make_loader(data_config(processor), [dataset])
        loader.restore_state(state)
    assert 30 < len(shown) < 60
    assert len(set(shown[:30])) == 30
    assert len(set(shown[30:])) == len(shown) - 30


def test_a_mixture_read_by_several_workers_goes_on_where_it_was_left(
    processor: Path, tmp_path: Path
) -> None:
    """On every rank, in the middle of an epoch of files with weights, and after the next resume."""
    big = make_dataset(tmp_path, make_records(tmp_path, 40), name="big")
    small = make_dataset(tmp_path, make_records(tmp_path, 7), name="small")
    datasets = [DatasetConfig(big.path, weight=0.7), DatasetConfig(small.path, weight=2.5)]
    config = data_config(processor, num_workers=3)

    def loader_of(rank: int, state: bytes | None = None) -> VLMLoader:
        loader = make_loader(config, datasets, data_parallel_rank=rank, data_parallel_size=2)
        if state is not None:
            loader.restore_state(state)
        return loader

    def shown_by(loader: VLMLoader, count: int) -> list[list[str]]:
        return [batch.sample_keys for batch in islice(iter(loader), count)]

    for rank in range(2):
        whole = loader_of(rank)
        expected = shown_by(whole, 30)
        first = loader_of(rank)
        assert shown_by(first, 8) == expected[:8]
        second = loader_of(rank, first.save_state())
        assert shown_by(second, 5) == expected[8:13]
        third = loader_of(rank, second.save_state())
        assert shown_by(third, 17) == expected[13:]
        assert third.counters() == whole.counters()
    files = Counter(key.split("-")[0] for pack in expected for key in pack)
    assert min(files["big"], files["small"]) > 10, "both files are in it"
