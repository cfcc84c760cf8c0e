"""File-system steps that survive a power cut, and the names of a checkpoint's parts on disk.

A run folder holds `step-0000100/` per committed checkpoint, `latest.json`, and for the time of a
save `step-0000100.tmp-<process>-<id>-<host>/`. The temporary name carries its owner, so that a
later run can tell a dead writer's left-overs from a save in progress; an export's has it too.
"""

import errno
import os
import re
import shutil
import socket
import time
import uuid
from itertools import cycle
from pathlib import Path

from megatron_dattn.checkpoint.hashing import HashBeside
from megatron_dattn.runtime.os_errors import named
from megatron_dattn.runtime.progress import Advance
from megatron_dattn.runtime.untrusted_file import open_plain

LATEST_FILE = "latest.json"
TRASH_PREFIX = ".trash-"
DAMAGED = ".damaged-"

_STEP = re.compile(r"step-([0-9]{7,})")
_TEMPORARY = re.compile(r"(.+)\.tmp-(\d+)-[0-9a-f]{12}-(.+)")
_HASH_BLOCK = 4 * 1024 * 1024
PAGES_KEPT = 64 * 1024 * 1024
"""Bytes of a large file that is read or written once and may stand in the page cache meanwhile."""
_FOREIGN_LEFTOVER_AGE = 24 * 3600.0


def step_folder_name(step: int) -> str:
    return f"step-{step:07d}"


def step_of(name: str) -> int | None:
    """The step that a folder name stands for; None for every other name.

    A step has one name: `step-00000005` with one zero too many is another folder of somebody's.
    """
    match = _STEP.fullmatch(name)
    step = int(match[1]) if match else None
    return step if step is not None and name == step_folder_name(step) else None


def temporary_name(final: str) -> str:
    """Of a folder of this process that will be called `final` when it is complete."""
    return f"{final}.tmp-{os.getpid()}-{uuid.uuid4().hex[:12]}-{_host()}"


def trash_name(name: str) -> str:
    return f"{TRASH_PREFIX}{uuid.uuid4().hex[:12]}-{name}"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname()) or "unknown"


def is_temporary(name: str) -> bool:
    """True if it is the name of a checkpoint that is being saved."""
    match = _TEMPORARY.fullmatch(name)
    return match is not None and step_of(match[1]) is not None


def is_passing(name: str) -> bool:
    """True if it is the name of something half written, half deleted, or set aside as damaged."""
    aside = (TRASH_PREFIX in name, _TEMPORARY.fullmatch(name), DAMAGED in name)
    return any(aside)


def damaged_name(name: str) -> str:
    """Under which what cannot be used is kept for people to look at."""
    return f"{name}{DAMAGED}{uuid.uuid4().hex[:12]}"


def is_abandoned(folder: Path) -> bool:
    """True if a temporary folder's writer is dead.

    A writer of this process is (saves do not overlap), one of this host is if its process is gone,
    one of another host is believed dead when nothing in the folder changed for a day.
    """
    match = _TEMPORARY.fullmatch(folder.name)
    if match is None:
        return False
    if match[3] == _host():
        process = int(match[2])
        return process == os.getpid() or not _process_exists(process)
    newest = max(entry.stat().st_mtime for entry in (folder, *folder.iterdir()))
    return time.time() - newest > _FOREIGN_LEFTOVER_AGE


def _process_exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def size_and_sha256(path: Path, advance: Advance = lambda done: None) -> tuple[int, str]:
    """Bytes and sha256 of a file, read block by block; `advance` is told the bytes of each."""
    size = 0
    with (
        open_plain(path, follow_links=False) as plain,
        open(plain.fileno(), "rb", 0, closefd=False) as file,
        HashBeside() as digest,
    ):
        length = min(_HASH_BLOCK, os.fstat(plain.fileno()).st_size + 1)
        # Two blocks in turns: fresh memory for each would cost more than the read.
        blocks = cycle((memoryview(bytearray(length)), memoryview(bytearray(length))))
        while count := file.readinto(block := next(blocks)):
            if size:
                digest.finish()
            digest.begin(block[:count])  # hashed beside the next read
            size += count
            advance(count)
        if size:
            digest.finish()
        return size, digest.hexdigest()


def forget_pages(descriptor: int, offset: int = 0, length: int = 0) -> None:
    """Ask the kernel to write what waits in an open file's page cache, and to drop what is clean.

    Gigabytes that pass through once would otherwise push everything else out of memory, wait for
    the last sync to be written, and take a fresh page each, which costs more than the copy into it.
    Nothing happens on systems that cannot be asked.

    Args:
        offset, length: of the part that is meant, in bytes; length 0 means to the end.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and force it to the disk."""
    with named(path), open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_synced(path: Path, data: bytes) -> None:
    """Replace a file at once: readers and crashes see the old content or the new, never a mix."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        write_synced(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries (new names, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force a folder, and all files and folders in it, to the disk."""
    for inner, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_file(Path(inner, name))
        sync_folder(Path(inner))


def remove_folder(folder: Path) -> None:
    """Delete a checkpoint in two moves, so that a half-deleted one is never taken for a whole.

    Raises:
        OSError: if it cannot be renamed or deleted. A link is not: what it leads to is not ours.
    """
    if folder.is_symlink():
        raise OSError(errno.EINVAL, "it is a link, and what it leads to is not deleted", folder)
    trash = folder.with_name(trash_name(folder.name))
    folder.rename(trash)
    shutil.rmtree(trash)
