"""Single records of tars: ours in any order, others' in their forms, and none that is damaged."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dattn.data import shard_reader
from megatron_dattn.data.conversation import image_paths
from megatron_dattn.data.image_files import EmbeddedImages, RecordWithImages, read_image_file
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.data.shard_reader import ShardReader, ShardRows, as_record
from megatron_dattn.data.shards import ShardSet, open_shards
from megatron_dattn.errors import DataError, OutageError
from tests.unit.data.builders import make_records, make_shards, record

RECORDS = 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(make_shards(tmp_path, make_records(tmp_path, RECORDS), size=6).path)


def by_hand(folder: Path, *samples: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> ShardSet:
    """A shard as another program may have written it."""
    path, offsets = folder / "hand.tar", []
    with tarfile.open(path, "w", format=form) as tar:
        for number, parts in enumerate(samples):
            offsets.append(tar.offset)
            for name, data in parts.items():
                member = tarfile.TarInfo(f"sub/{number}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        offsets.append(tar.offset)
    return ShardSet((path,), (np.array(offsets, np.uint64),))


def test_records_come_in_any_order_with_their_images(tmp_path: Path, folder: Path) -> None:
    records = make_records(tmp_path, RECORDS)
    reader = ShardReader(open_shards(folder))
    for number in (19, 0, 6, 5, 18, 13, 0):
        sample = reader[number]
        read = json.loads(sample.text)
        assert read["conversations"] == records[number]["conversations"]
        paths = image_paths(records[number])
        files = [(tmp_path / path).read_bytes() for path in paths]
        assert [read_image_file(sample.images, name) for name in image_paths(read)] == files


def open_below(folder: Path) -> int:
    """Count this process's open files of a folder; what other tests left open is not among them."""
    links = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    # The descriptor that listed the folder is gone by now, so its link leads nowhere.
    return sum(link.exists() and link.resolve().is_relative_to(folder.resolve()) for link in links)


def test_only_some_tars_are_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "_OPEN_TARS", 2)
    reader = ShardReader(open_shards(folder))
    texts = [reader[number].text for number in range(RECORDS)]
    assert open_below(folder) == 2
    assert [reader[number].text for number in reversed(range(RECORDS))] == texts[::-1]
    assert open_below(folder) == 2
    del reader
    assert open_below(folder) == 0


def test_every_damaged_header_is_an_error_and_no_lost_record(folder: Path) -> None:
    shards = open_shards(folder)
    path, offsets = shards.paths[1], shards.offsets[1]
    good = path.read_bytes()
    starts = range(0, int(offsets[-1]), tarfile.BLOCKSIZE)
    headers = [start for start in starts if good[start + 257 : start + 262] == b"ustar"]
    assert len(headers) > 8
    for start in headers:
        record = int(np.searchsorted(offsets, start, side="right")) - 1
        path.write_bytes(good[:start] + b"\xff" * 8 + good[start + 8 :])
        with pytest.raises(DataError, match=f"record {record} of shard .* not where the index"):
            ShardReader(shards)[6 + record]
    path.write_bytes(good[: int(offsets[3]) + 700])
    with pytest.raises(DataError, match="cut, damaged or written anew"):
        ShardReader(shards)[6 + 3]
    path.write_bytes(good[512:])
    with pytest.raises(DataError, match="cut, damaged or written anew"):
        ShardReader(shards)[6 + 1]


def test_a_tar_that_is_gone_or_cannot_be_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = open_shards(folder)
    shards.paths[0].unlink()
    with pytest.raises(DataError, match="No such file"):
        ShardReader(shards)[0]

    def fail(*_: Any) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("megatron_dattn.data.system_errors.WAITS", (0.0,))
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OutageError, match="Input/output error"):
        ShardReader(shards)[7]


def test_other_programs_tars_are_read(tmp_path: Path) -> None:
    """With long names (PAX's and GNU's headers), folders, and images named in other ways."""
    turns = record("<image>", "a")["conversations"]
    named = {"image": "coco/a.jpg", "conversations": turns}
    two = record("<image><image>", "a", ["0.jpg", "1.jpg"])
    samples = [
        {"jpg": b"one", "json": json.dumps(turns).encode()},
        {"json": json.dumps(named).encode(), "png": b"two", "cls": b"7"},
        {"json": json.dumps({"conversations": turns}).encode(), "webp": b"three"},
        {"json": json.dumps(two).encode(), "0.jpg": b"four", "1.jpg": b"five"},
        {"json": json.dumps(named).encode(), f"{'x' * 150}.jpg": b"six"},
    ]
    expected = [[b"one"], [b"two"], [b"three"], [b"four", b"five"], [b"six"]]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        rows = ShardRows(by_hand(tmp_path, *samples, form=form)).rows(range(len(samples)))
        for (_, found), images in zip(rows, expected, strict=True):
            assert isinstance(found, RecordWithImages)
            assert [found.files[name] for name in image_paths(found)] == images


def test_one_image_is_never_taken_for_another() -> None:
    """Of several, one was not there: what is there is not it."""
    images = EmbeddedImages({"0.jpg": b""})
    for paths in (["0.jpg", "./0.jpg"], ["./a.jpg", "0.jpg"]):
        value = record("<image><image>", "a", paths)
        assert as_record(value, images) == value
    with pytest.raises(SampleError, match="not there when the shard was made"):
        read_image_file(images, "./0.jpg")
    with pytest.raises(SampleError, match="an address"):
        read_image_file(images, "https://a/0.jpg")


def test_a_sample_without_text_and_one_that_is_too_large_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = by_hand(tmp_path, {"jpg": b"x"}, {"json": b"[", "jpg": b"x"}, {"json": b"3"})
    with pytest.raises(SampleError, match="has no 'json'; its parts are jpg") as found:
        ShardReader(shards)[0]
    assert found.value.reason == Reason.BAD_RECORD
    assert [value for _, value in ShardRows(shards).rows([1, 2])] == ["[", 3]
    monkeypatch.setattr(shard_reader, "_MAX_RECORD_BYTES", 100)
    with pytest.raises(SampleError, match="at most 100 are read"):
        ShardReader(shards)[1]


def test_records_with_images_travel_to_other_processes() -> None:
    import pickle

    value = RecordWithImages({"image": "0.jpg"}, {"0.jpg": b"x"})
    copy = pickle.loads(pickle.dumps(value))
    assert isinstance(copy, RecordWithImages)
    assert (copy, copy.files) == (value, value.files)
