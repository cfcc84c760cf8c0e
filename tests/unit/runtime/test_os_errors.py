"""What the system refuses is told by the name of the limit that was met."""

import contextlib
import errno
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_dattn.runtime import os_errors
from megatron_dattn.runtime.os_errors import explain, named, room_in, shortage


def error_of(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "mounted read-only"),
        (errno.EIO, "disk or its server failed"),
        (errno.EFBIG, "the file system takes no file of this size"),
        (errno.EMFILE, "raise ulimit -n"),
        (errno.ENFILE, "fs.file-max"),
        (errno.ENOMEM, "not enough memory"),
        (errno.ENOSPC, "the disk is full, "),
    ],
)
def test_a_limit_has_a_name(tmp_path: Path, number: int, words: str) -> None:
    said = explain(error_of(number), tmp_path / "not" / "there")
    assert said.startswith(f"{os.strerror(number)}: '{tmp_path}/not/there' (")
    assert words in said
    assert shortage(error_of(number)) is not None


@contextlib.contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_limit_of_the_shell_is_no_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with file_size_limit(1000):
        with pytest.raises(OSError) as caught, named(path), path.open("wb") as file:
            file.write(b"x" * 2000)
        said = explain(caught.value)
    assert said.startswith(f"File too large: '{path}' (this process may write no file of more than")
    assert "1,000 bytes: raise ulimit -f" in said
    assert "full" not in said


def test_a_copy_names_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 2000)
    with file_size_limit(1000), pytest.raises(OSError) as caught:
        shutil.copyfile(tmp_path / "source", tmp_path / "copy")
    assert explain(caught.value).startswith(f"File too large: '{tmp_path}/copy' (")


def test_a_device_that_is_full() -> None:
    with pytest.raises(OSError) as caught, named("/dev/full"), open("/dev/full", "w") as file:
        file.write("x")
    assert explain(caught.value).startswith("No space left on device: '/dev/full' (the disk is ")


def test_a_disk_without_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = list(os.statvfs(tmp_path))
    fields[7] = 0  # f_favail
    monkeypatch.setattr(os_errors.os, "statvfs", lambda path: os.statvfs_result(fields))
    assert "no inode is free" in explain(error_of(errno.ENOSPC, str(tmp_path)))
    assert room_in(tmp_path).endswith("but no inode for another file")


def test_other_errors_say_what_they_always_said(tmp_path: Path) -> None:
    refused = error_of(errno.EACCES, str(tmp_path))
    assert explain(refused) == f"Permission denied: '{tmp_path}'"
    assert shortage(refused) is None
    assert explain(OSError("told in words")) == "told in words"
    own = OSError(errno.EFBIG, "it has more than the 9 bytes that such a file may have", "f")
    assert explain(own) == "it has more than the 9 bytes that such a file may have: 'f'"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough mem"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (RuntimeError("[enforce fail at device.cc:186] Too many open files"), "ulimit -n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "memory on the GPU"),
        (RuntimeError("shapes differ"), None),
        (ValueError("can't start new thread"), None),
    ],
)
def test_shortages_in_the_words_of_others(error: Exception, words: str | None) -> None:
    said = shortage(error)
    assert said is None if words is None else said is not None and words in said
