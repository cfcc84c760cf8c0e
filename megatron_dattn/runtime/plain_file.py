"""Opens files that somebody else has put there: plain ones only, and none that makes us wait.

A named pipe in the place of a file is waited for as long as nobody writes into it, a device such as
/dev/zero has no end, and both have size 0. What a file is gets looked at before it is opened, and
once more when it is open: it may have been exchanged in between.
"""

import errno
import os
import stat
from typing import BinaryIO

_KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_plain(path: str | os.PathLike[str], *, follow_links: bool = True) -> BinaryIO:
    """Open a plain file to be read.

    Args:
        follow_links: whether a link to a plain file counts as one, as in Hugging Face's cache.

    Raises:
        OSError: it is not there, cannot be read, or is something else; `strerror` says what.
    """
    _require_plain(os.stat(path, follow_symlinks=follow_links), path)
    # A pipe that came in between is not waited for either.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    try:
        _require_plain(os.fstat(descriptor), path)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_plain(path: str | os.PathLike[str], *, max_bytes: int, follow_links: bool = True) -> bytes:
    """All of a plain file.

    Raises:
        OSError: as for `open_plain`; also if it has more bytes than that.
    """
    with open_plain(path, follow_links=follow_links) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size + 1) if size <= max_bytes else b""
        if len(data) > size:  # some plain files (those of /proc) have more than their size says
            data += file.read(max_bytes + 1 - len(data))
    if max(size, len(data)) > max_bytes:
        reason = f"it has more than the {max_bytes:,} bytes that such a file may have"
        raise OSError(errno.EFBIG, reason, os.fspath(path))
    return data


def _require_plain(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kind = next((name for test, name in _KINDS if test(status.st_mode)), "of an unknown kind")
    raise OSError(errno.EINVAL, f"it is {kind}, not a plain file", os.fspath(path))
