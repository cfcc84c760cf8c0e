"""Reading single lines of a prepared file, by the index that stands beside it.

A line costs two small reads at known places: nothing is kept in memory however long the file is,
and lines may be asked for in any order. What is read is checked to be a whole line of the file: one
that was cut, rewritten or exchanged while it is read is an error, and never a record that is lost.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.data.system_errors import patiently
from megatron_dattn.errors import DataError

INDEX_SUFFIX = ".idx"
OFFSET = struct.Struct("Q")  # Energon's index: the byte offset of every line, then the file's size

MAX_LINE_BYTES = 16 * 2**20
"""Of a record. A text of so many bytes is millions of tokens; what else such a line may hold can
take 1.2 s and 0.5 GB to parse."""


def as_line(record: Any) -> bytes:
    """A record as it stands in a prepared file, with its line break."""
    return json.dumps(record, ensure_ascii=True).encode() + b"\n"


def require_line_length(length: int) -> None:
    """Raise SampleError for a record that has too many bytes to be parsed."""
    if length > MAX_LINE_BYTES:
        raise SampleError(
            Reason.BAD_RECORD, f"the record has {length} bytes; at most {MAX_LINE_BYTES} are read"
        )


def parse_line(line: bytes | SampleError) -> Any:
    """The record of a line. Raises SampleError for a line that holds none, or is one itself."""
    if isinstance(line, SampleError):
        raise line
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SampleError(Reason.BAD_RECORD, f"the line is not valid JSON: {error}") from error


class JsonLines:
    """The lines of one file. Files are opened at the first use, in the process that reads."""

    def __init__(self, path: Path, num_records: int) -> None:
        self._path = path
        self._num_records = num_records
        self._files: tuple[int, int] | None = None

    def __getitem__(self, record: int) -> bytes:
        """One line with its line break.

        Raises:
            DataError: file and index cannot be read, or do not belong together (any more).
            OutageError: the system fails, and goes on failing.
            SampleError: the line is too long to be a record.
        """
        what = f"record {record} of data set '{self._path}'"
        try:
            return patiently(what, lambda: self._line(record))
        except OSError as error:
            raise DataError(
                f"{what} cannot be read: {error.strerror or error}; if its files are damaged or "
                "gone, prepare it again with tools/prepare_data.py"
            ) from error

    def _line(self, record: int) -> bytes:
        lines, index = self._open()
        start, end = self._place(index, record)
        if end - start > MAX_LINE_BYTES and os.pread(lines, 1, end - 1) != b"\n":
            raise self._changed(record)  # not a long line, but a wrong place
        require_line_length(end - start)
        before = min(start, 1)  # the line break that ends the line before
        text = os.pread(lines, end - start + before, start - before)
        line = text[before:]
        if len(line) != end - start or text[:before] not in (b"", b"\n"):
            raise self._changed(record)
        first_break = line.find(b"\n")
        # Files of other programs may end without one.
        unended = first_break == -1 and record == self._num_records - 1
        if first_break != len(line) - 1 and not unended:
            raise self._changed(record)
        return line

    def _place(self, index: int, record: int) -> tuple[int, int]:
        """Where a line starts and ends."""
        entries = os.pread(index, 2 * OFFSET.size, record * OFFSET.size)
        if len(entries) != 2 * OFFSET.size:
            raise self._changed(record)
        (start,), (end,) = OFFSET.iter_unpack(entries)
        if not start < end < 2**63:  # the largest place that a file can have
            raise self._changed(record)
        return start, end

    def _changed(self, record: int) -> DataError:
        return DataError(
            f"data set '{self._path}' and its index disagree about record {record}: one of them "
            "was cut or rewritten after they were made; prepare it again with tools/prepare_data.py"
        )

    def _open(self) -> tuple[int, int]:
        if self._files is None:
            lines = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                index = os.open(f"{self._path}{INDEX_SUFFIX}", os.O_RDONLY | os.O_CLOEXEC)
            except BaseException:
                os.close(lines)
                raise
            # Reads name their place, so workers that are forked later may share the descriptors.
            self._files = lines, index
        return self._files

    def __del__(self) -> None:
        for descriptor in self._files or ():
            os.close(descriptor)
