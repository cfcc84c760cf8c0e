"""One run at a time writes into a run folder.

Two runs that save into the same folder prune each other's checkpoints, and nobody notices before
one of them has to be resumed. So the first rank of a run holds `run.lock` while it trains, with the
name of its host and process, and touches it every few seconds. A lock whose owner is dead is taken
over: on the owner's own machine the process tells, elsewhere a lock that nobody touches any more.
"""

import contextlib
import json
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from megatron_dattn.errors import UserError
from megatron_dattn.runtime.untrusted_file import read_json_object

LOCK_FILE = "run.lock"
BEAT_SECONDS = 5.0
# A busy file server may answer one beat late, hardly three.
_BEATS_TO_WAIT = 3
_MAX_BYTES = 4096

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    run_id: str
    host: str
    process: int
    started: float
    """When the process began, in seconds since 1970: process numbers are used again."""
    machine: str
    """Of one boot of a kernel and one process namespace: only there the number means something."""

    @staticmethod
    def of_this_process() -> "Owner":
        process = psutil.Process()
        return Owner(
            run_id=uuid.uuid4().hex[:12],
            host=socket.gethostname(),
            process=process.pid,
            started=process.create_time(),
            machine=_machine(),
        )

    @property
    def is_gone(self) -> bool | None:
        """True if the process has ended; None if it cannot be seen from here."""
        if self.machine != _machine():
            return None
        try:
            return abs(psutil.Process(self.process).create_time() - self.started) > 1.0
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"run {self.run_id} (process {self.process} on {self.host})"


def _machine() -> str:
    """Containers of one host may share its name, but not its process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


class RunLock:
    """Holds a run folder until `release`; made by `acquire`."""

    def __init__(self, path: Path, owner: Owner) -> None:
        self._path, self._owner = path, owner
        self._released = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._beats.start()

    @staticmethod
    def acquire(folder: str | Path) -> "RunLock":
        """Take the lock of a run folder, which is made if it is not there; call it on one rank.

        Raises:
            UserError: another run that is alive holds it.
        """
        path = Path(folder) / LOCK_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        owner = Owner.of_this_process()
        if not _create(path, owner):
            _take_over(path, owner)
        return RunLock(path, owner)

    def release(self) -> None:
        """Give the folder back, if it is still ours."""
        self._released.set()
        self._beats.join()
        with contextlib.suppress(OSError):
            if _owner_of(self._path) == self._owner:
                self._path.unlink()

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                holder = _owner_of(self._path)
                if holder is not None and holder != self._owner:
                    logger.error("%s is no longer this run's: another run was started", self._path)
                    return
                if holder is None and not self._make_again():
                    return
                os.utime(self._path)
            except FileNotFoundError:  # the folder is gone: the next save makes it again
                continue
            except OSError as error:  # a file server that is away for a while
                logger.warning("%s cannot be touched: %s", self._path, error)

    def _make_again(self) -> bool:
        """Whether there is a lock of ours again where none was left."""
        made = _create(self._path, self._owner)
        if made:
            logger.warning("%s was deleted under this run: it is made again", self._path)
        else:
            logger.error("%s was replaced under this run: it keeps no other run out", self._path)
        return made


def is_in_use(folder: str | Path) -> bool:
    """True if a run works in a folder, as far as that can be told without waiting.

    An owner that cannot be seen from here, on another host, counts as alive as long as its lock has
    been touched lately.
    """
    path = Path(folder) / LOCK_FILE
    owner = _owner_of(path)
    gone = None if owner is None else owner.is_gone
    return _touched_lately(path) if gone is None else not gone


def _touched_lately(path: Path) -> bool:
    touched = _touched(path)
    if touched is None:
        return False
    try:
        # A new file beside it tells the time by the same clock, the file server's.
        with tempfile.TemporaryFile(dir=path.parent) as clock:
            now = os.fstat(clock.fileno()).st_mtime_ns
    except OSError:
        return True
    return now - touched <= _BEATS_TO_WAIT * BEAT_SECONDS * 1e9


def _create(path: Path, owner: Owner) -> bool:
    """Whether there was no lock; then there is ours, whole from its first moment."""
    mine = _write_beside(path, owner)
    try:
        _link(mine, path)
    except FileExistsError:
        return False
    finally:
        mine.unlink()
    return True


def _link(mine: Path, path: Path) -> None:
    """Give a whole file a name that must be free."""
    try:
        os.link(mine, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: the name is taken first, then filled
        with path.open("xb") as file:
            file.write(mine.read_bytes())


def _write_beside(path: Path, owner: Owner) -> Path:
    mine = path.with_name(f".{path.name}.{owner.run_id}")
    mine.write_text(json.dumps(asdict(owner)))
    return mine


def _take_over(path: Path, owner: Owner) -> None:
    """Replace a dead owner's lock.

    Raises:
        UserError: the owner is alive, or another run was faster.
    """
    former = _owner_of(path)
    if former is not None and not _is_dead(path, former):
        raise UserError(
            f"{path.parent} is in use by {former}, which is still running: two runs would delete "
            "each other's checkpoints; name another folder with checkpoint.save, or end that run"
        )
    if path.is_dir():
        raise UserError(f"{path} is a folder, where a run keeps its lock: move it away")
    logger.warning("%s of %s is taken over: its owner is dead", path, former or "nobody")
    os.replace(_write_beside(path, owner), path)
    # Of several that take over at once the last one's file stays: each looks whose it is.
    time.sleep(0.2)
    if (holder := _owner_of(path)) != owner:
        raise UserError(f"{path.parent} was taken by {holder} at the same moment; start again")


def _is_dead(path: Path, owner: Owner) -> bool:
    gone = owner.is_gone
    if gone is not None:
        return gone
    logger.info("waiting whether %s is still alive, which holds %s", owner, path)
    first = _touched(path)
    for _ in range(_BEATS_TO_WAIT):
        time.sleep(BEAT_SECONDS)
        if _touched(path) != first:
            return False
    return True


def _touched(path: Path) -> int | None:
    """When it was touched last. It is opened for that: NFS answers `stat` alone from memory."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _owner_of(path: Path) -> Owner | None:
    """None if there is no lock, or one that says nothing."""
    try:
        return Owner(**read_json_object(path, UserError, max_bytes=_MAX_BYTES))
    except (OSError, UserError, TypeError):
        return None
