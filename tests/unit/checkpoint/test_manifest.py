"""The manifest notices every change of every file, its own included, and names the file."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dattn.checkpoint import read_manifest, verify
from megatron_dattn.checkpoint.manifest import MANIFEST_FILE, FileRecord, Manifest, write_manifest
from megatron_dattn.errors import CheckpointError

# Every file of a checkpoint of one rank.
FILES = [".metadata", "__0_0.distcp", "common.pt", "loader-dp-00000.bin", "metadata.json",
         MANIFEST_FILE]  # fmt: skip


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip_one_bit(place: float) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        index = int(place * (len(data) - 1))
        return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]

    return flip


DAMAGES = {
    "truncated": truncate,
    "empty": lambda data: b"",
    "deleted": None,
    "longer": lambda data: data + b"\n",
    **{f"bit at {place}": flip_one_bit(place) for place in (0.0, 0.1, 0.37, 0.5, 0.83, 1.0)},
}


def damage(file: Path, how: Callable[[bytes], bytes] | None) -> None:
    if how is None:
        file.unlink()
    else:
        file.write_bytes(how(file.read_bytes()))


def test_a_checkpoint_has_exactly_these_files(save: Callable[[int], Path]) -> None:
    assert sorted(file.name for file in save(1).iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_damage_of_every_file_is_found(save: Callable[[int], Path], name: str) -> None:
    folder = save(1)
    sound = (folder / name).read_bytes()
    for kind, how in DAMAGES.items():
        damage(folder / name, how)
        print(kind)  # shown if the next line does not raise
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            verify(folder)
        (folder / name).write_bytes(sound)
    assert verify(folder).step == 1


def test_sizes_alone_miss_a_flipped_bit_but_not_a_missing_byte(
    save: Callable[[int], Path],
) -> None:
    folder = save(1)
    shards = folder / "__0_0.distcp"
    damage(shards, flip_one_bit(0.5))
    assert verify(folder, sums=False).step == 1
    damage(shards, truncate)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged: \d+ bytes instead of"):
        verify(folder, sums=False)


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = Manifest(
        step=7,
        facts={"model": {"width": 4, "rates": [0.1, 1e-7]}, "modules": ["body"], "stage": "\u00e9"},
        layout={"world": 2},
        files={"a.bin": FileRecord(3, "ab" * 32)},
    )
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert manifest.modules == ("body",)
    assert manifest.versions["megatron-core"] == importlib.metadata.version("megatron-core")


def test_a_flipped_bit_of_any_byte_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    write_manifest(tmp_path, Manifest(3, {"a": 1}, {"world": 1}, {"f": FileRecord(1, "0" * 64)}))
    file = tmp_path / MANIFEST_FILE
    data = file.read_bytes()
    for index in range(len(data)):
        bit = 1 << index % 8
        file.write_bytes(data[:index] + bytes([data[index] ^ bit]) + data[index + 1 :])
        with pytest.raises(CheckpointError):
            read_manifest(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", "{", '{"format": 3}', "\x00"])
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_a_manifest_of_a_later_format_is_refused_by_name(tmp_path: Path) -> None:
    write_manifest(tmp_path, Manifest(3, {}, {}, {}))
    file = tmp_path / MANIFEST_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": "megatron_dattn/9"}))
    with pytest.raises(CheckpointError, match="megatron_dattn/9"):
        read_manifest(tmp_path)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of this program"):
        read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint of this program"):
        read_manifest(tmp_path / "nowhere")


def test_the_manifest_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Manifest(1, {}, {}, {}).step = 2  # type: ignore[misc]
