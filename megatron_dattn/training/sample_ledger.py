"""The sample ledger: which samples each step really consumed, one JSON line per step.

One file per data-parallel rank. It is the evidence that a resumed run reads exactly the samples
that the uninterrupted one would have read, and the place to look for a sample that hurt. A hole in
it is therefore told, and never closed in silence; but it holds nothing that training needs, so no
damage of it keeps a run from going on.
"""

import contextlib
import errno
import json
import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from megatron_dattn.checkpoint.files import damaged_name, replace_synced, sync_folder
from megatron_dattn.errors import DataError
from megatron_dattn.runtime.append_file import AppendFile
from megatron_dattn.runtime.os_errors import explain, named
from megatron_dattn.runtime.untrusted_file import open_plain, parse_json

logger = logging.getLogger(__name__)

Packs = list[list[str]]

_MAX_LINE_BYTES = 64 * 2**20
_MAX_SHOWN = 8
# What `open_plain` says of a folder or a pipe, and the system of a link to itself. Any other error
# is one of the system, which may give the file back.
_NO_PLAIN_FILE = (errno.EINVAL, errno.ELOOP)


class SampleLedger:
    """Appends `{"step", "packs": [[key, ...], ...]}` lines; every line reaches the file at once.

    A line that the disk refuses waits for the next one or for `sync`, and `failure` says why: the
    rank that meets it must not leave the others alone in the middle of a step.
    """

    def __init__(
        self,
        folder: str | Path,
        data_parallel_rank: int,
        resumed_step: int,
        *,
        is_new_rank: bool = False,
    ) -> None:
        """Open the rank's file; lines of steps that a resumed run will do again are dropped.

        Steps up to there that the file does not hold are named in a warning. What is no line of a
        ledger is set aside with the whole file, as `...damaged-...`; its sound lines are kept.

        Args:
            resumed_step: steps that the loaded checkpoint had done; 0 for a new run.
            is_new_rank: the run that is gone on with had fewer ranks: this one had no packs in the
                steps after its file's last one, which is written down.

        Raises:
            OSError: the folder cannot be written.
        """
        self._path = Path(folder) / _file_name(f"{data_parallel_rank:05d}")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = _Kept(resumed_step, is_new_rank)
        temporary = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            with named(self._path), open(temporary, "xb") as file:
                kept.copy(self._path, file)
                file.flush()
                os.fsync(file.fileno())
            if kept.damage is not None:
                aside = self._path.with_name(damaged_name(self._path.name))
                os.replace(self._path, aside)
                logger.warning("%s %s; it is now %s", self._path, kept.damage, aside.name)
            os.replace(temporary, self._path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(self._path.parent)
        if kept.missing:
            more = ", ..." if len(kept.missing) > _MAX_SHOWN else ""
            logger.warning(
                "the sample ledger %s lacks steps %s, though the checkpoint is of step %d",
                self._path,
                ", ".join(kept.missing[:_MAX_SHOWN]) + more,
                resumed_step,
            )
        self._file = AppendFile(self._path)
        self._waiting = b""
        self.failure: str | None = None
        """Why lines wait, in words; None if none does."""

    def write(self, step: int, packs: Iterable[list[str]]) -> None:
        """Note the sample keys of one step, pack by pack."""
        self._waiting += _encode(step, list(packs)).encode()
        with contextlib.suppress(OSError):  # kept in `failure`
            self._flush()

    def sync(self) -> None:
        """Force all lines to the disk, as a checkpoint is that relies on them.

        A file that was deleted or replaced meanwhile is written again: it is open, so nothing of
        it is lost.

        Raises:
            OSError: they are not all there.
        """
        self._flush()
        self._file.sync()
        if not self._file.is_in_place():
            self._put_back()

    def _put_back(self) -> None:
        """Write what is in the open file into a new one of its name."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = ""
        if os.path.lexists(self._path):
            other = self._path.with_name(damaged_name(self._path.name))
            os.replace(self._path, other)
            aside = f"; what was in its place is now {other.name}"
        replace_synced(self._path, self._file.content())
        self._file.close()
        self._file = AppendFile(self._path)
        logger.warning("%s was deleted under this run: it is written again%s", self._path, aside)

    def close(self) -> None:
        """Write what still waits, if that is possible now."""
        with contextlib.suppress(OSError):
            self._flush()
        with contextlib.suppress(OSError):
            self._file.close()

    def _flush(self) -> None:
        try:
            self._file.append(self._waiting)
        except OSError as error:
            self.failure = explain(error)
            raise
        self._waiting, self.failure = b"", None


@dataclass
class _Kept:
    """The lines of a former run that a resumed one keeps, and what is wrong with the others."""

    resumed_step: int
    is_new_rank: bool = False
    damage: str | None = None
    """Of the file, as the end of a sentence that begins with its name."""
    missing: list[str] = field(default_factory=list)
    """Steps and ranges of steps that the resumed run counts as done, without a line."""
    _last: int = 0

    def copy(self, source: Path, target: BinaryIO) -> None:
        """Write the sound lines of steps up to the resumed one."""
        try:
            with open_plain(source) as file:
                for number, line in enumerate(_raw_lines(file), 1):
                    self._take(number, line, target)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in _NO_PLAIN_FILE:
                raise
            self.damage = f"is no ledger ({error.strerror})"
        if self.is_new_rank:
            for step in range(min(self._last, self.resumed_step) + 1, self.resumed_step + 1):
                target.write(_encode(step, []).encode())
        else:
            self._miss(self.resumed_step + 1)

    def _take(self, number: int, line: bytes, target: BinaryIO) -> None:
        if not line.endswith(b"\n") and line.startswith(b"{") and b"\0" not in line:
            return  # the last one, which a dying process left unfinished
        try:
            step, packs = _decode(line)
            if step <= self._last:
                raise ValueError(f"step {step} comes after step {self._last}")
        except ValueError as error:
            self.damage = self.damage or f"is damaged in line {number} ({error})"
            return
        self._miss(min(step, self.resumed_step + 1))
        if step <= self.resumed_step:
            target.write(_encode(step, packs).encode())
        self._last = step

    def _miss(self, step: int) -> None:
        """Note what is missing between the last line and one of this step."""
        first, last = self._last + 1, step - 1
        if first <= last:
            self.missing.append(str(first) if first == last else f"{first}-{last}")


def drop_later_steps(folder: str | Path, num_ranks: int, resumed_step: int) -> None:
    """Drop the steps that a resumed run does again from the files of ranks that it does not have.

    Args:
        num_ranks: data-parallel ranks that the resumed run has; their files are their own business.

    Raises:
        OSError: the folder cannot be read or written.
    """
    for path in sorted(Path(folder).glob(_file_name("?????"))):
        number = path.name[-len("00000.jsonl") : -len(".jsonl")]
        if number.isdecimal() and int(number) >= num_ranks:
            SampleLedger(folder, int(number), resumed_step, is_new_rank=True).close()


def read_ledger(path: str | Path) -> dict[int, Packs]:
    """Step -> sample keys of its packs, from one rank's file.

    A last line that a dying process left unfinished is ignored.

    Raises:
        DataError: a line is none of a ledger.
        OSError: it cannot be read.
    """
    packs: dict[int, Packs] = {}
    with open_plain(path) as file:
        for number, line in enumerate(_raw_lines(file), 1):
            if line.endswith(b"\n"):
                try:
                    step, packs[step] = _decode(line)
                except ValueError as error:
                    raise DataError(f"{path} is damaged in line {number}: {error}") from error
    return packs


def _file_name(rank: str) -> str:
    return f"samples-dp{rank}.jsonl"


def _encode(step: int, packs: Packs) -> str:
    return json.dumps({"step": step, "packs": packs}) + "\n"


def _raw_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends, in pieces where one is longer than any line of ours."""
    while line := file.readline(_MAX_LINE_BYTES):
        yield line


def _decode(line: bytes) -> tuple[int, Packs]:
    """Step and packs of a line.

    Raises:
        ValueError: it is none of a ledger.
    """
    content = parse_json(line)
    if not isinstance(content, dict) or type(content.get("step")) is not int:
        raise ValueError("it has no step")
    packs = content.get("packs")
    if not isinstance(packs, list) or not all(_is_pack(pack) for pack in packs):
        raise ValueError("it has no packs of sample keys")
    return content["step"], packs


def _is_pack(pack: object) -> bool:
    return isinstance(pack, list) and all(isinstance(key, str) for key in pack)
