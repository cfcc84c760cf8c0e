"""Reading files of records one record at a time: published lists have millions, and gigabytes.

A .json file holds one list, a .jsonl file one record per line. Both are UTF-8, -16 or -32, with a
byte-order mark or without. Of parquet files and of folders of shards, whose records have numbers,
single ones can be read; records of these bring their images along.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from megatron_dattn.data.parquet_rows import ParquetRows, parquet_files
from megatron_dattn.data.shard_reader import ShardRows
from megatron_dattn.data.shards import is_shard_folder, open_shards
from megatron_dattn.errors import DataError

_CHARACTERS_AT_A_TIME = 2**20
# A record of more bytes than MAX_LINE_BYTES is refused later; what is longer still is no record,
# but a place from which the rest of the file makes no sense.
_MAX_CHARACTERS = 2**26
_SAMPLING = re.compile(r"(first|end|random):(\d+)(%?)")


NumberedRecords = ParquetRows | ShardRows


def open_rows(path: Path) -> NumberedRecords | None:
    """The records of parquet files or of a folder of shards; None for a file of JSON.

    Raises:
        DataError: the folder is of another kind, or what is in it cannot be read.
    """
    if is_shard_folder(path):
        return ShardRows(open_shards(path))
    if files := parquet_files(path):
        return ParquetRows(files)
    if path.is_dir():
        raise DataError(
            f"'{path}' is a folder with neither parquet files nor the shards of an Energon data set"
        )
    return None


def read_records(path: Path) -> Iterator[Any]:
    """The records of a file of JSON, of parquet files or of a folder of shards.

    Raises:
        DataError: the file is missing, cannot be read or holds something else than records; some
            records may have come before.
    """
    rows = open_rows(path)
    yield from _read_json(path) if rows is None else (r for _, r in rows.rows(range(len(rows))))


def _read_json(path: Path) -> Iterator[Any]:
    count = 0
    try:
        with path.open("rb") as file:
            encoding = json.detect_encoding(file.read(4))
        with path.open(encoding=encoding, newline="\n") as text:
            for record in _lines(text) if path.suffix == ".jsonl" else _ListReader(text):
                count += 1
                yield record
    except FileNotFoundError as error:
        raise DataError(f"'{path}' does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise DataError(
            f"'{path}' cannot be read as JSON, from record {count} on: {what}"
        ) from error
    if count == 0:
        raise DataError(f"'{path}' must hold a list of records and at least one of them")


def select_records(
    path: Path, sampling: str = "all", *, seed: int = 0
) -> Iterator[tuple[int, Any]]:
    """The records that a sampling strategy takes, with their numbers, in the order of the file.

    Args:
        sampling: `all`, or `first:N`, `end:N`, `random:N` where N is a number of records or a
            percentage. Percentages, `end` and `random` read the file twice.

    Raises:
        DataError: there is no such strategy, it takes no record, or the file cannot be read.
    """
    kind, count, percent = _parsed(sampling)
    if (rows := open_rows(path)) is not None:
        yield from rows.rows(select_numbers(len(rows), sampling, seed=seed))
        return
    numbered = enumerate(_read_json(path))
    if kind == "all":
        yield from numbered
        return
    if kind == "first" and not percent:
        yield from islice(numbered, count)
        return
    total = sum(1 for _ in _read_json(path))
    places = map(int, select_numbers(total, sampling, seed=seed))
    following = next(places)
    for number, record in numbered:
        if number == following:
            yield number, record
            if (following := next(places, -1)) == -1:
                return


def select_numbers(total: int, sampling: str, *, seed: int = 0) -> Sequence[int] | np.ndarray:
    """The numbers of the records that a sampling strategy takes out of so many, ascending.

    Raises:
        DataError: there is no such strategy, or it takes no record.
    """
    kind, count, percent = _parsed(sampling)
    if kind == "all":
        return range(total)
    count = min(total, -(-total * count // 100) if percent else count)
    if kind == "random":
        return np.sort(np.array(random.Random(seed).sample(range(total), count)))
    return np.arange(count) + (total - count if kind == "end" else 0)


def _parsed(sampling: str) -> tuple[str, int, str]:
    """Kind, count, and whether that is a percentage."""
    if sampling == "all":
        return sampling, 0, ""
    match = _SAMPLING.fullmatch(sampling)
    if match is None:
        raise DataError(
            f"sampling strategy '{sampling}' is unknown; use all, first:N, end:N or random:N, with "
            "N a number or a percentage such as 10%"
        )
    if int(match[2]) == 0:
        raise DataError(f"sampling strategy '{sampling}' takes no records")
    return match[1], int(match[2]), match[3]


def _lines(text: TextIO) -> Iterator[Any]:
    # Files that were put together one behind the other have marks in the middle too.
    for line in text:
        if line := line.removeprefix("\ufeff").strip():
            yield json.loads(line)


class _ListReader:
    """Iterates over the elements of one JSON list, holding a part of its text."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._place = 0  # in the text: everything before is read

    def __iter__(self) -> Iterator[Any]:
        if self._next_character() == "\ufeff":
            self._place += 1
        if self._next_character() != "[":
            self._element()  # says what is wrong with a file that is no JSON
            raise ValueError("it must hold a list of records")
        self._place += 1
        if self._next_character() == "]":
            self._place += 1
        else:
            yield from self._elements()
        if self._next_character():
            raise ValueError("there is something behind the end of the list")

    def _elements(self) -> Iterator[Any]:
        while True:
            yield self._element()
            character = self._next_character()
            self._place += 1
            if character == "]":
                return
            if character != ",":
                raise ValueError(f"expected ',' or ']' and found {character or 'the end'!r}")

    def _element(self) -> Any:
        self._next_character()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError:
                if len(self._text) - self._place > _MAX_CHARACTERS or not self._read_on():
                    raise
            else:
                # A number may go on behind what was read: 1, but 1e-5.
                if end + len("e-5") <= len(self._text) or not self._read_on():
                    self._place = end
                    return value

    def _next_character(self) -> str:
        """The next character that is no white space, which is not read yet; none at the end."""
        while True:
            rest = self._text[self._place : self._place + 1]
            if rest and not rest.isspace():
                return rest
            self._place += len(rest)
            if not rest and not self._read_on():
                return ""

    def _read_on(self) -> bool:
        """Read as much as there is unread, so that a long element is not looked at too often."""
        rest = self._text[self._place :]
        more = self._file.read(max(_CHARACTERS_AT_A_TIME, len(rest)))
        if more:
            self._text, self._place = rest + more, 0
        return bool(more)
