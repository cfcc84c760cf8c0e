"""A file that grows by whole records: one that does not get through leaves nothing behind.

A full disk takes half a record, and a buffer would offer the rest again with every later write and
once more when the file is closed. Here a record is written at once and to its end, or the file is
cut back to where it was, so that the next one may be tried.
"""

import contextlib
import os
from pathlib import Path

from megatron_dattn.runtime.os_errors import named


class AppendFile:
    """Appends to a file, which is made if it is not there.

    Raises:
        OSError: it cannot be opened; every error names the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = self.path.open("a+b", buffering=0)
        self._length = self._file.seek(0, os.SEEK_END)

    def append(self, record: bytes) -> None:
        """Write a record, all of it or nothing.

        Raises:
            OSError: nothing is written, and a later call may succeed.
        """
        rest = memoryview(record)
        try:
            with named(self.path):
                while rest:
                    rest = rest[self._file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._length)
            raise
        self._length += len(record)

    def sync(self) -> None:
        """Force all of it to the disk.

        Raises:
            OSError: the disk, or its server, has lost some.
        """
        with named(self.path):
            os.fsync(self._file.fileno())

    def is_in_place(self) -> bool:
        """True if the file still stands under its name: it may have been deleted or replaced."""
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(self._file.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def content(self) -> bytes:
        """All that is in it, also if it no longer has a name."""
        with named(self.path):
            self._file.seek(0)
            return self._file.read()

    def close(self) -> None:
        """Let go of it.

        Raises:
            OSError: a file server tells only now of what it could not write.
        """
        with named(self.path):
            self._file.close()
