"""Reading single lines of a prepared file, by the index that stands beside it.

A line costs two small reads at known places: nothing is kept in memory however long the file is,
and lines may be asked for in any order.
"""

import os
import struct
from pathlib import Path

from megatron_dattn.data.system_errors import is_of_the_file, patiently
from megatron_dattn.errors import DataError

INDEX_SUFFIX = ".idx"
OFFSET = struct.Struct("Q")  # Energon's index: the byte offset of every line, then the file's size


class JsonLines:
    """The lines of one file. Files are opened at the first use, in the process that reads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: tuple[int, int] | None = None

    def __getitem__(self, row: int) -> bytes:
        """One line with its line break.

        Raises:
            DataError: the file cannot be read, or has become shorter since it was indexed.
        """
        return patiently(f"row {row} of '{self._path}'", lambda: self._line(row))

    def _line(self, row: int) -> bytes:
        try:
            lines, index = self._open()
            entry = os.pread(index, 2 * OFFSET.size, row * OFFSET.size)
            start, end = OFFSET.iter_unpack(entry)
            line = os.pread(lines, end[0] - start[0], start[0])
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and not is_of_the_file(error):
                raise
            raise DataError(f"row {row} of '{self._path}' cannot be read: {error}") from error
        if len(line) != end[0] - start[0]:
            raise DataError(f"'{self._path}' ends within its row {row}; prepare it again")
        return line

    def _open(self) -> tuple[int, int]:
        if self._files is None:
            # Reads name their place, so workers that are forked later may share the descriptors.
            self._files = (
                os.open(self._path, os.O_RDONLY),
                os.open(f"{self._path}{INDEX_SUFFIX}", os.O_RDONLY),
            )
        return self._files

    def __del__(self) -> None:
        for descriptor in self._files or ():
            os.close(descriptor)
