"""The folder of a WebDataset: what does not fit together is one error before anything is read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.data.dataset import open_dataset
from megatron_dattn.data.shards import open_shards
from megatron_dattn.errors import DataError
from tests.unit.data.builders import make_records, make_shards

RECORDS = 7


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of at most three records."""
    return Path(make_shards(tmp_path, make_records(tmp_path, RECORDS), size=3).path)


def test_a_folder_opens_as_a_data_set(folder: Path) -> None:
    dataset = open_dataset(DatasetConfig(str(folder)))
    assert dataset.num_samples == RECORDS
    assert dataset.name == folder.name
    assert dataset.shards is not None
    assert [path.name for path in dataset.shards.paths] == [f"shard_0000{n}.tar" for n in range(3)]


def test_the_fingerprint_is_that_of_the_records(tmp_path: Path, folder: Path) -> None:
    records = make_records(tmp_path, RECORDS)
    same = make_shards(tmp_path / "same", records, size=3, images=tmp_path)
    records[4]["conversations"][1]["value"] += " and a longer answer" * 40
    other = make_shards(tmp_path / "other", records, size=3, images=tmp_path)
    first, second, third = (open_shards(Path(p)) for p in (folder, same.path, other.path))
    assert first.fingerprint == second.fingerprint != third.fingerprint


def _cut(folder: Path) -> None:
    path = folder / "shard_00001.tar"
    path.write_bytes(path.read_bytes()[:2000])


def _remove_first_index_entry(folder: Path) -> None:
    path = folder / "shard_00000.tar.idx"
    path.write_bytes(path.read_bytes()[8:])


def _swap_index_entries(folder: Path) -> None:
    path = folder / "shard_00000.tar.idx"
    data = path.read_bytes()
    path.write_bytes(data[8:16] + data[:8] + data[16:])


def _count_wrong(folder: Path) -> None:
    path = folder / ".nv-meta" / ".info.json"
    info = json.loads(path.read_text())
    info["shard_counts"]["shard_00002.tar"] = 3
    path.write_text(json.dumps(info))


def _name_outside(folder: Path) -> None:
    (folder / ".nv-meta" / ".info.json").write_text('{"shard_counts": {"../a.tar": 1}}')


def _exclude(what: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / ".nv-meta" / "split.yaml"
        path.write_text(path.read_text().replace("exclude: []", f"exclude: ['{what}']"))

    return change


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "shard_00001.tar").unlink(), "1 of its 3 shards missing"),
    (lambda folder: (folder / "shard_00001.tar.idx").unlink(), "has no index"),
    (_cut, "it was cut"),
    (_remove_first_index_entry, "counts 3: one of them was changed"),
    (_swap_index_entries, "do not ascend"),
    (_count_wrong, "has 1 records, but .info.json counts 3"),
    (_name_outside, "not below the folder"),
    (lambda folder: (folder / ".nv-meta" / ".info.json").unlink(), "prepared to its end"),
    (lambda folder: (folder / ".nv-meta" / ".info.json").write_text("{"), "not valid JSON"),
    (lambda folder: (folder / ".nv-meta" / "split.yaml").unlink(), "split.yaml' does not exist"),
    (
        lambda folder: (folder / ".nv-meta" / "split.yaml").write_text("train: 3"),
        "the shards of every",
    ),
    (_exclude("shard_00000.tar/1"), "only whole shards can be excluded"),
    (_exclude("shard_{00000..00002}.tar"), "has no shards in part 'train'"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[words for _, words in DAMAGES])
def test_damage_is_one_error(folder: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(folder)
    with pytest.raises(DataError, match=words) as found:
        open_dataset(DatasetConfig(str(folder)))
    assert "\n" not in str(found.value)


def test_a_part_is_chosen_and_shards_may_be_excluded(folder: Path) -> None:
    path = folder / ".nv-meta" / "split.yaml"
    parts = "{train: ['shard_{00000..00001}.tar'], val: [shard_00002.tar]}"
    path.write_text(f"split_parts: {parts}\nexclude: [shard_00000.tar]\n")
    assert open_shards(folder).num_records == 3
    assert open_dataset(DatasetConfig(str(folder), split="val")).num_samples == 1
    with pytest.raises(DataError, match=r"no shards in part 'test'; its parts are train \(1\), va"):
        open_shards(folder, "test")


def test_shards_have_no_image_root(folder: Path) -> None:
    with pytest.raises(DataError, match="leave its image_root out"):
        open_dataset(DatasetConfig(str(folder), image_root=str(folder)))
