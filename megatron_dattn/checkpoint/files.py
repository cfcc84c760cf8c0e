"""A checkpoint's files: their names, their sums, and steps that survive a power cut.

A run folder holds `step-0000100/` per committed checkpoint, `latest.json`, and for the time of a
save `step-0000100.tmp-<process>-<id>-<host>/`. The temporary name carries its owner, so that a
later run can tell a dead writer's left-overs from a save in progress; an export's has it too.

`HashBeside` takes sha256 sums beside other work: a helper thread hashes a block while its owner
writes or reads.
"""

import _thread
import errno
import hashlib
import os
import queue
import re
import shutil
import socket
import time
import uuid
from itertools import cycle
from pathlib import Path
from typing import Any

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
# Of smaller blocks the sum costs less than the helper.
_WORTH_HELP = 256 * 1024


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


class HashBeside:
    """Context manager: a sha256 that is fed block by block.

    `begin` a block, do other work that leaves its bytes as they are, `finish` it: one at a time.

    A thread may die before it begins, or not begin at all, where memory is short; `threading` and
    `concurrent.futures` then wait for it for ever, in the middle of a save. Here a block that the
    helper has not taken by the time its sum is needed is hashed by whoever needs it.

    Args:
        alone: ask for no helper.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self._digest = hashlib.sha256()
        self._blocks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._hashed = _thread.allocate_lock()  # held from `begin` until the block is hashed
        self._failure: BaseException | None = None
        self._alone = alone
        self._asked_for_help = False

    def __enter__(self) -> "HashBeside":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._asked_for_help:
            self._blocks.put(None)

    def begin(self, block: Any) -> None:
        """Hand over the next block: bytes, or anything with their interface."""
        if not (self._alone or self._asked_for_help) and memoryview(block).nbytes >= _WORTH_HELP:
            self._ask_for_help()
        self._hashed.acquire()
        self._blocks.put(block)

    def finish(self) -> None:
        """Wait until the block is hashed, or hash it here if nobody else has begun."""
        try:
            block = self._blocks.get_nowait()
        except queue.Empty:
            self._hashed.acquire()
            self._hashed.release()
        else:
            self._hash(block)
        if self._failure is not None:
            raise self._failure

    def hexdigest(self) -> str:
        """The sum of all blocks so far, after `finish`."""
        return self._digest.hexdigest()

    def _ask_for_help(self) -> None:
        self._asked_for_help = True
        try:
            _thread.start_new_thread(self._help, ())
        except (RuntimeError, MemoryError):
            return  # no thread is to be had

    def _help(self) -> None:
        while (block := self._blocks.get()) is not None:
            self._hash(block)
            del block  # not kept alive until the next one comes

    def _hash(self, block: Any) -> None:
        try:
            self._digest.update(block)
        except BaseException as failure:
            self._failure = failure
        finally:
            self._hashed.release()


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
