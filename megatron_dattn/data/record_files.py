"""Reading files of records one record at a time: published lists have millions, and gigabytes.

A .json file holds one list, a .jsonl file one record per line. Both are UTF-8, -16 or -32, with a
byte-order mark or without.
"""

import json
import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from megatron_dattn.errors import DataError

_CHARACTERS_AT_A_TIME = 2**20
# A record of more bytes than MAX_LINE_BYTES is refused later; what is longer still is no record,
# but a place from which the rest of the file makes no sense.
_MAX_CHARACTERS = 2**26
_SAMPLING = re.compile(r"(first|end|random):(\d+)(%?)")


def read_records(path: Path) -> Iterator[Any]:
    """The records of a file.

    Raises:
        DataError: the file is missing, is not JSON or holds something else than records; some
            records may have come before.
    """
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
    numbered = enumerate(read_records(path))
    if sampling == "all":
        yield from numbered
        return
    match = _SAMPLING.fullmatch(sampling)
    if match is None:
        raise DataError(
            f"sampling strategy '{sampling}' is unknown; use all, first:N, end:N or random:N, with "
            "N a number or a percentage such as 10%"
        )
    kind, count, percent = match[1], int(match[2]), match[3]
    if count == 0:
        raise DataError(f"sampling strategy '{sampling}' takes no records")
    if kind == "first" and not percent:
        yield from islice(numbered, count)
        return
    total = sum(1 for _ in read_records(path))
    count = min(total, -(-total * count // 100) if percent else count)
    if kind == "random":
        taken = np.sort(np.array(random.Random(seed).sample(range(total), count)))
    else:
        taken = np.arange(count) + (total - count if kind == "end" else 0)
    places = map(int, taken)
    following = next(places)
    for number, record in numbered:
        if number == following:
            yield number, record
            if (following := next(places, -1)) == -1:
                return


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
