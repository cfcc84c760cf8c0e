"""A prepared file and its index: what does not fit is found, at the start or at the record."""

import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.data.dataset import open_dataset
from megatron_dattn.data.json_lines import MAX_LINE_BYTES, JsonLines
from megatron_dattn.data.prepare import write_jsonl
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.errors import DataError
from tests.unit.data.builders import data_config, make_dataset, make_loader, make_records

RECORDS = [{"text": "x" * length} for length in (3, 40, 1, 17, 5, 9)]
FAR = np.uint64(2**63)  # beyond what a place in a file can be
REMEDY = "tools/prepare_data.py"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_jsonl(RECORDS, tmp_path / "set.jsonl")
    return tmp_path / "set.jsonl"


def index_of(path: Path) -> Path:
    return Path(f"{path}.idx")


def change_index(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    offsets = np.fromfile(index_of(path), np.uint64)
    change(offsets).astype(np.uint64).tofile(index_of(path))


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewrite_in_place(path: Path) -> None:
    """Same records and same size in another order."""
    lines = path.read_bytes().splitlines(keepends=True)
    with path.open("r+b") as file:
        file.writelines(reversed(lines))


# Damage of the file and of its index, and whether the sizes alone give it away.
DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut": cut_in_half,
    "emptied": lambda path: os.truncate(path, 0),
    "rewritten": rewrite_in_place,
    "index cut": lambda path: cut_in_half(index_of(path)),
    "index cut within an entry": lambda path: os.truncate(index_of(path), 21),
    "index emptied": lambda path: os.truncate(index_of(path), 0),
    "index of another file": lambda path: change_index(path, lambda x: x * 2),
    "index not rising": lambda path: change_index(path, lambda x: x[[0, 3, 2, 1, 4, 5, 6]]),
    "index with an empty line": lambda path: change_index(path, lambda x: x[[0, 1, 1, 3, 4, 5, 6]]),
    "index not from the start": lambda path: change_index(path, lambda x: x[1:]),
    "index beyond the file": lambda path: change_index(path, lambda x: x * 10**12),
    "index beyond all files": lambda path: change_index(path, lambda x: x | (x > 0) * FAR),
    "index too long": lambda path: os.truncate(index_of(path), 10**12),
    "index gone": lambda path: index_of(path).unlink(),
    "gone": lambda path: path.unlink(),
}


def test_lines_are_read_in_any_order(path: Path) -> None:
    lines = JsonLines(path, len(RECORDS))
    read = {record: lines[record] for record in (5, 0, 3, 1, 4, 2)}
    assert b"".join(read[record] for record in range(6)) == path.read_bytes()
    assert open_dataset(DatasetConfig(str(path))).num_samples == 6


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_at_the_start(path: Path, damage: str) -> None:
    DAMAGE[damage](path)
    with pytest.raises(DataError) as caught:
        open_dataset(DatasetConfig(str(path)))
    assert str(path) in str(caught.value)
    assert REMEDY in str(caught.value) or damage == "gone"


# Whole lines of the right file, if others: only the start can tell.
@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "index not from the start"])
def test_damage_under_a_reader_is_an_error_and_never_other_lines(path: Path, damage: str) -> None:
    whole = path.read_bytes().splitlines(keepends=True)
    lines = JsonLines(path, len(RECORDS))
    if "gone" not in damage:  # of what is open, a name may go
        lines[0]
    DAMAGE[damage](path)
    errors = []
    for record, line in enumerate(whole):
        try:
            assert lines[record] == line
        except DataError as error:
            errors.append((record, error))
    assert errors or damage == "index too long"  # what it says of the records is right
    for record, error in errors:
        assert not isinstance(error, SampleError), "it is no matter of one sample"
        assert (
            f"record {record} of data set '{path}'" in f"{error}"
            or f"record {record}:" in f"{error}"
        )
        assert str(path) in str(error)
        assert REMEDY in str(error)


def test_two_lines_that_became_one_are_both_lost(path: Path) -> None:
    """The second one still ends where it did, but a line does not begin there."""
    data = bytearray(path.read_bytes())
    data[data.index(b"\n")] = ord(" ")
    path.write_bytes(data)
    lines = JsonLines(path, len(RECORDS))
    for record in (0, 1):
        with pytest.raises(DataError, match=f"about record {record}:"):
            lines[record]
    assert lines[2] == b'{"text": "x"}\n'


def test_a_file_of_another_program_may_lack_the_last_line_break(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)
    change_index(path, lambda x: x - (x == x[-1]))
    assert open_dataset(DatasetConfig(str(path))).num_samples == 6
    assert JsonLines(path, 6)[5] == b'{"text": "xxxxxxxxx"}'


def test_a_line_that_is_too_long_is_a_bad_record_and_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl([{"x": "y" * MAX_LINE_BYTES}, {"x": "y"}], tmp_path / "set.jsonl")
    lines = JsonLines(tmp_path / "set.jsonl", 2)
    assert open_dataset(DatasetConfig(str(tmp_path / "set.jsonl"))).num_samples == 2
    longest, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *at: longest.append(at[1]) or pread(*at))
    with pytest.raises(SampleError, match=str(MAX_LINE_BYTES)) as caught:
        lines[0]
    assert caught.value.reason == Reason.BAD_RECORD
    assert lines[1] == b'{"x": "y"}\n'
    assert max(longest) < 100


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", ["emptied", "rewritten", "index cut"])
def test_a_run_whose_file_is_damaged_ends_with_one_line(
    processor: Path, tmp_path: Path, num_workers: int, damage: str
) -> None:
    """Out of a worker too, where an exception would arrive as the text of a traceback."""
    dataset = make_dataset(tmp_path, make_records(tmp_path, 40))
    loader = make_loader(data_config(processor, num_workers=num_workers), [dataset])
    batches = iter(loader)
    next(batches)
    DAMAGE[damage](Path(dataset.path))
    text = r"^data set '.*set.jsonl'.* record \d+:.*prepare_data"
    with pytest.raises(DataError, match=text) as caught:
        list(islice(batches, 100))
    assert "\n" not in str(caught.value)
    assert loader.counters().skipped == {}
