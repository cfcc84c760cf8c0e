"""A system that fails: waited out, then one error, and never counted against the data."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_dattn.data import image_files, json_lines, system_errors
from megatron_dattn.data.check import RecordChecker, check_records
from megatron_dattn.data.dataset import open_dataset
from megatron_dattn.data.image_decoding import decode_image
from megatron_dattn.data.image_files import image_is_there, read_image_file
from megatron_dattn.data.json_lines import JsonLines
from megatron_dattn.data.missing import MissingList, missing_image, records_with_images
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.data.system_errors import is_of_the_file, patiently
from megatron_dattn.errors import DataError, OutageError
from tests.unit.data.builders import (
    data_config,
    make_dataset,
    make_loader,
    make_records,
    record,
    save_image,
)

OF_THE_FILE = ("ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "ENAMETOOLONG", "EACCES", "EPERM", "EINVAL")
OF_THE_SYSTEM = (
    "EIO",
    "ESTALE",
    "ENOTCONN",
    "EMFILE",
    "ENFILE",
    "ENOMEM",
    "ETIMEDOUT",
)


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits that only note how long they would have been."""
    taken: list[float] = []
    monkeypatch.setattr(system_errors.time, "sleep", taken.append)
    return taken


def failing(code: str, times: int = 1000) -> Callable[[], bytes]:
    """A read that fails so often, then gives b"data"."""
    left = [times]

    def read() -> bytes:
        left[0] -= 1
        if left[0] >= 0:
            number = getattr(errno, code)
            raise OSError(number, os.strerror(number), "a.png")
        return b"data"

    return read


@pytest.mark.parametrize("code", OF_THE_FILE)
def test_an_error_of_the_file_comes_at_once(code: str, naps: list[float]) -> None:
    with pytest.raises(OSError, match=r"a\.png") as caught:
        patiently("image 'a.png'", failing(code))
    assert is_of_the_file(caught.value)
    assert naps == []


@pytest.mark.parametrize("code", OF_THE_SYSTEM)
def test_an_error_of_the_system_is_waited_out_and_ends_the_run(
    code: str, naps: list[float]
) -> None:
    with pytest.raises(DataError, match=rf"^image 'a.png' cannot be read: .*\({code}\)") as caught:
        patiently("image 'a.png'", failing(code))
    assert not isinstance(caught.value, SampleError)
    assert "no fault of the data" in str(caught.value)
    assert 3 <= sum(naps) <= 4


def test_a_short_outage_is_not_noticed(naps: list[float]) -> None:
    assert patiently("image 'a.png'", failing("ESTALE", times=4)) == b"data"
    assert naps == list(system_errors.WAITS)


@pytest.mark.parametrize(
    ("code", "words"), [("EMFILE", "ulimit -n"), ("EIO", "dmesg"), ("ETIMEDOUT", "out of order")]
)
def test_the_error_says_what_to_mend(naps: list[float], code: str, words: str) -> None:
    with pytest.raises(DataError, match=rf"{words}.*; mend that, then start again"):
        patiently("image 'a.png'", failing(code))


def break_opening(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Neither opening nor asking about an image works, while other files do."""
    number = getattr(errno, code)

    def broken(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            if str(path).endswith(".png"):
                raise OSError(number, os.strerror(number), str(path))
            return function(path, *args, **options)

        return call

    monkeypatch.setattr(image_files.os, "open", broken(os.open))
    monkeypatch.setattr(image_files.os, "stat", broken(os.stat))


def test_an_outage_is_no_missing_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, naps: list[float]
) -> None:
    save_image(tmp_path / "a.png", seed=1)
    records = [record("<image>", "y", "a.png")] * 3
    assert missing_image(records[0], str(tmp_path)) is None
    assert missing_image(record("<image>", "y", "b.png"), str(tmp_path)) == "b.png"
    break_opening(monkeypatch, "EIO")
    message = r"^image 'a.png' below .*Input/output error \(EIO\)"
    with pytest.raises(DataError, match=message):
        read_image_file(str(tmp_path), "a.png")
    with pytest.raises(DataError, match=message):
        image_is_there(str(tmp_path), "a.png")
    missing = MissingList(tmp_path / "missing.txt")
    with pytest.raises(DataError, match=message), missing:  # prepare_data --drop-missing
        list(records_with_images(enumerate(records), tmp_path, missing))
    assert not list(tmp_path.glob("missing*"))
    with pytest.raises(DataError, match=message):  # check_data
        list(check_records(records, RecordChecker(tmp_path, 10**6), path="x", workers=2))


def test_a_file_that_may_not_be_read_is_the_sample_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, naps: list[float]
) -> None:
    save_image(tmp_path / "a.png", seed=1)
    break_opening(monkeypatch, "EACCES")
    with pytest.raises(SampleError, match="Permission denied") as caught:
        read_image_file(str(tmp_path), "a.png")
    assert caught.value.reason == Reason.MISSING_IMAGE
    assert naps == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_outage_ends_the_loader_with_one_line(
    processor: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    naps: list[float],
    num_workers: int,
) -> None:
    """From a worker too: without its traceback."""
    dataset = make_dataset(tmp_path, make_records(tmp_path, 10))
    loader = make_loader(data_config(processor, num_workers=num_workers), [dataset])
    break_opening(monkeypatch, "ENOTCONN")
    with pytest.raises(DataError, match=r"^image 'images/\d.png' below .*ENOTCONN") as caught:
        list(loader)
    assert "\n" not in str(caught.value)
    assert loader.counters().num_skipped == 0


def no_memory(*args: Any, **options: Any) -> Any:
    raise MemoryError


def codec_without_memory(*args: Any, **options: Any) -> Any:
    raise OSError("out of memory error when reading image file")


@pytest.mark.parametrize("fault", [no_memory, codec_without_memory])
def test_lack_of_memory_is_no_broken_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any]
) -> None:
    save_image(tmp_path / "a.png", seed=1)
    monkeypatch.setattr("PIL.Image.Image.convert", fault)
    with pytest.raises(MemoryError):
        decode_image((tmp_path / "a.png").read_bytes(), max_pixels=10**6)
    checked = check_records(
        [record("<image>", "y", "a.png")], RecordChecker(tmp_path, 10**6), path="x"
    )
    with pytest.raises(DataError, match=r"memory ran out while decoding image 'a.png'"):
        list(checked)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("place", ["images.decode_image", "task_encoder.build_batch"])
def test_lack_of_memory_ends_the_loader_with_one_line(
    processor: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_workers: int,
    place: str,
) -> None:
    dataset = make_dataset(tmp_path, make_records(tmp_path, 10))
    loader = make_loader(data_config(processor, num_workers=num_workers), [dataset])
    monkeypatch.setattr(f"megatron_dattn.data.{place}", no_memory)
    with pytest.raises(DataError, match=r"^memory ran out while .* sample.* set-0") as caught:
        list(loader)
    assert "\n" not in str(caught.value)
    assert loader.counters().num_skipped == 0
    if place.startswith("images"):
        assert "images/" in str(caught.value)


@pytest.mark.parametrize("outage", [3, 1000])
def test_an_outage_of_the_records_file_is_waited_out_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, naps: list[float], outage: int
) -> None:
    lines = JsonLines(Path(make_dataset(tmp_path, [record("x", "y")]).path), 1)
    real, faults = os.pread, iter(range(outage))

    def read(*arguments: int) -> bytes:
        if next(faults, None) is not None:
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments)

    monkeypatch.setattr(json_lines.os, "pread", read)
    if outage > len(system_errors.WAITS):
        with pytest.raises(DataError, match=r"record 0 of .*set\.jsonl' cannot .*EIO"):
            lines[0]
    else:
        assert json.loads(lines[0]) == record("x", "y")
        assert len(naps) == outage


@pytest.mark.parametrize("outage", [3, 1000])
def test_an_outage_while_the_index_is_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, naps: list[float], outage: int
) -> None:
    dataset = make_dataset(tmp_path, [record("x", "y")])
    real, faults = Path.read_bytes, iter(range(outage))

    def read(path: Path) -> bytes:
        if next(faults, None) is not None:
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    if outage > len(system_errors.WAITS):
        with pytest.raises(OutageError, match=r"data set '.*set\.jsonl' cannot .*EIO"):
            open_dataset(dataset)
    else:
        assert open_dataset(dataset).num_samples == 1
        assert len(naps) == outage
