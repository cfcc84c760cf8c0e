"""What the operating system refuses, in words: which limit it was, and what mends it.

`[Errno 27] File too large` and `[Errno 28] No space left on device` name neither the shell's limit
that was met nor the quota that is used up, and a disk with 70 GiB free can be full all the same.
Every writer that fails explains itself with `explain`; `shortage` also knows the forms in which
torch reports the same, as a RuntimeError.
"""

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

GIB = 2**30

_SHORT_OF_DEVICE_MEMORY = (
    "not enough memory on the GPU: raise execution.recompute or the parallel sizes, lower the "
    "budgets or training.micro_batch_size; --dry-run estimates what a layout needs"
)
_SHORT_OF_MEMORY = (
    "not enough memory: the process has met a limit (ulimit -v, the job's or the container's), or "
    "the machine has no more"
)
# How torch's C++ parts spell a shortage; their exception is a RuntimeError.
_MEMORY_WORDS = ("can't allocate memory", "Cannot allocate memory", "bad_alloc", "unable to mmap")
_DEVICE_WORDS = ("CUDA out of memory", "CUDA error: out of memory")
_THREAD_WORDS = ("can't start new thread",)
_HANDLE_WORDS = ("Too many open files",)


def explain(error: OSError, path: str | os.PathLike[str] | None = None) -> str:
    """The error's reason and place, with what stands behind it where that is known.

    Args:
        path: the file or folder that was to be written, where the error does not name one.
    """
    # Of two, as a copy or a rename has, the second is the one that is written.
    given = error.filename if error.filename2 is None else error.filename2
    place = path if given is None else given
    reason = error.strerror or str(error) or type(error).__name__
    words = background(error, place)
    where = "" if place is None else f": {os.fspath(place)!r}"
    return f"{reason}{where}{words and f' ({words})'}"


@contextlib.contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give an OSError of the block the file's name: one of `write` or `fsync` has none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def shortage(error: BaseException) -> str | None:
    """Say what the machine is short of, if that is what an exception says.

    A full disk, a limit of the shell, too little memory: no bug of ours, and a traceback would only
    hide it. None for any other exception, other errors of the file system among them.
    """
    if isinstance(error, MemoryError):
        return _SHORT_OF_MEMORY
    if isinstance(error, OSError):
        return explain(error) if background(error) else None
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    for words, reason in (
        (_DEVICE_WORDS, _SHORT_OF_DEVICE_MEMORY),
        (_MEMORY_WORDS, _SHORT_OF_MEMORY),
        (_THREAD_WORDS, _of_threads()),
        (_HANDLE_WORDS, f"Too many open files ({_of_handles()})"),
    ):
        if any(word in text for word in words):
            return reason
    return None


def room_in(folder: str | os.PathLike[str]) -> str:
    """Say how much a folder's disk can still take, as the predicate of a sentence."""
    status = _file_system_of(folder)
    if status is None:
        return "has an unknown amount free now"
    free = f"has {status.f_bavail * status.f_frsize / GIB:.3f} GiB free now"
    return f"{free}, but no inode for another file" if _has_no_inodes(status) else free


def background(error: OSError, place: str | os.PathLike[str] | None = None) -> str:
    """Say what an error number means on this machine; empty if its own words say enough.

    Args:
        place: the file or folder that was to be written, for a disk that is full.
    """
    number = error.errno
    if number is None or error.strerror != os.strerror(number):
        return ""  # one of ours, which explains itself
    if number == errno.EFBIG:
        return _of_file_size()
    if number == errno.ENOSPC:
        return _of_space(place)
    if number == errno.EMFILE:
        return _of_handles()
    if number == errno.EAGAIN:
        return _of_threads()
    return _MEANINGS.get(number, "")


_MEANINGS = {
    errno.EDQUOT: "the disk quota of this user, group or project is used up: make room, ask for "
    "more, or name a folder on another disk",
    errno.EROFS: "the file system is mounted read-only, which a failing disk or server also causes",
    errno.EIO: "the disk or its server failed; the kernel's log (dmesg) says more",
    errno.ESTALE: "the file server has forgotten the file; is the folder still mounted?",
    errno.ENFILE: "all programs of this machine together have too many open: fs.file-max",
    errno.ENOMEM: _SHORT_OF_MEMORY,
}


def _of_file_size() -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == resource.RLIM_INFINITY:
        return "the file system takes no file of this size"
    return (
        f"this process may write no file of more than {limit:,} bytes: raise ulimit -f, the limit "
        "on file sizes of the shell or job that started it"
    )


def _of_space(place: str | os.PathLike[str] | None) -> str:
    status = None if place is None else _file_system_of(place)
    if status is None:
        return "the disk is full: make room or name a folder on another disk"
    if _has_no_inodes(status):
        return "no inode is free for another file, though there is space: delete some files"
    free = status.f_bavail * status.f_frsize / GIB
    return (
        f"the disk is full, {free:.3f} GiB are free: make room (a quota or a reserve may keep the "
        "rest), or name a folder on another disk"
    )


def _of_handles() -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"this process may have {limit} open at a time: raise ulimit -n"


def _of_threads() -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    allowed = "without limit" if limit == resource.RLIM_INFINITY else f"up to {limit}"
    return (
        f"no further thread or process can be started (this user may have {allowed}, ulimit -u; a "
        "job or container has a limit of its own; memory for it may be short too)"
    )


def _has_no_inodes(status: os.statvfs_result) -> bool:
    return status.f_files > 0 and status.f_favail == 0 and status.f_bavail > 0


def _file_system_of(place: str | os.PathLike[str]) -> os.statvfs_result | None:
    """Of the place, or of the folder in which it would be made."""
    path = Path(os.path.abspath(place))
    for candidate in (path, *path.parents):
        try:
            return os.statvfs(candidate)
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None
