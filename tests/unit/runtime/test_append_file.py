"""Whole records or none."""

import os
from pathlib import Path

import pytest

from megatron_dattn.runtime.append_file import AppendFile


def test_it_goes_on_where_the_file_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old\n")
    file = AppendFile(path)
    file.append(b"new\n")
    assert path.read_bytes() == b"old\nnew\n", "at once"
    file.sync()
    file.close()


class Reluctant:
    """Takes five bytes at a time, and none after so many calls."""

    def __init__(self, path: Path, calls: int) -> None:
        self._file, self._calls = path.open("ab", buffering=0), calls

    def write(self, data: memoryview) -> int:
        self._calls -= 1
        if self._calls < 0:
            raise OSError(28, os.strerror(28))
        return self._file.write(data[:5])

    def truncate(self, length: int) -> None:
        self._file.truncate(length)


@pytest.mark.parametrize(("calls", "content"), [(2, b"old\n0123456789"), (1, b"old\n")])
def test_a_record_in_pieces(tmp_path: Path, calls: int, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old\n")
    file = AppendFile(path)
    file._file = Reluctant(path, calls)  # type: ignore[assignment]
    if calls == 2:
        file.append(b"0123456789")
    else:
        with pytest.raises(OSError, match="No space left") as caught:
            file.append(b"0123456789")
        assert caught.value.filename == str(path)
    assert path.read_bytes() == content
