"""Plain files are opened, everything else is refused at once: nothing waits, nothing has no end."""

import os
import socket
from pathlib import Path

import pytest

from megatron_dattn.runtime.plain_file import open_plain, read_plain


def test_a_plain_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert read_plain(tmp_path / "file", max_bytes=3) == b"abc"
    with open_plain(tmp_path / "file") as file:
        assert file.read() == b"abc"


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    # The name of a socket may have 107 bytes only.
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (Path.mkdir, "a folder"),
        (make_pipe, "a named pipe"),
        (make_socket, "a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
    ],
)
def test_what_is_no_plain_file_is_refused_by_kind(tmp_path: Path, make, kind: str) -> None:
    make(tmp_path / "thing")
    with pytest.raises(OSError) as error:
        read_plain(tmp_path / "thing", max_bytes=10)
    assert error.value.strerror == f"it is {kind}, not a plain file"


def test_links_are_followed_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert read_plain(tmp_path / "link", max_bytes=3) == b"abc"
    with pytest.raises(OSError) as error:
        read_plain(tmp_path / "link", max_bytes=3, follow_links=False)
    assert error.value.strerror == "it is a link, not a plain file"


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError) as error:
        read_plain(tmp_path / "sparse", max_bytes=1000)
    assert error.value.strerror == "it has more than the 1,000 bytes that such a file may have"


def test_a_size_that_is_told_wrong_is_noticed() -> None:
    assert os.stat("/proc/self/status").st_size == 0
    with pytest.raises(OSError, match="more than the 10 bytes"):
        read_plain("/proc/self/status", max_bytes=10)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_plain(tmp_path / "nothing")
