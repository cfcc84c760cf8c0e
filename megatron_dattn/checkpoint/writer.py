"""Writes this rank's share of a megatron-core distributed checkpoint, inside this process.

megatron-core forks its writers: if one dies, the save waits for ever. Here the same format
(`torch_dist`, version 1: `.distcp` shards, `.metadata`, `common.pt`, `metadata.json`) is produced
with torch's own archives and index, and `megatron.core.dist_checkpointing.load` reads the result.

No rank speaks to another here; the first one joins what all have written (`write_index`). So
another thread may write while the state is trained on, from a copy of it. Shards are hashed on
their way to the disk, not read again for it.
"""

import contextlib
import io
import os
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_dattn.checkpoint.files import PAGES_KEPT, HashBeside, forget_pages, sync_file
from megatron_dattn.checkpoint.manifest import FileRecord
from megatron_dattn.checkpoint.share import Share
from megatron_dattn.runtime.distributed import rank
from megatron_dattn.runtime.os_errors import named
from megatron_dattn.runtime.rank_errors import as_checkpoint_error, told_as

INDEX_FILE = ".metadata"
_BLOCK = 4 * 2**20
"""Bytes that are hashed and written in one go: what is hashed is still in the cache then."""


class SaveCancelledError(Exception):
    """The save was given up while its files were written."""


class _WatchedFileSystem(FileSystem):
    """Remembers the first failing write, and size and sha256 of every file.

    torch's archive writer hides the operating system's reason behind `unexpected pos 704 vs 598`.

    Args:
        alone: hash in this thread; a helper would take the processor from training.
        cancelled: once it is set no more is written.
    """

    def __init__(self, *, alone: bool = False, cancelled: threading.Event | None = None) -> None:
        self.error: Exception | None = None
        self.written: dict[str, FileRecord] = {}
        self.cancelled = cancelled
        self._alone = alone

    @contextlib.contextmanager
    def create_stream(
        self, path: str | os.PathLike, mode: str
    ) -> Generator[io.BufferedWriter, None, None]:
        digest = HashBeside(alone=self._alone)
        with digest, _WatchedStream(path, mode, self, digest) as stream:
            yield stream
        self.written[Path(path).name] = FileRecord(stream.size, digest.hexdigest())


class _WatchedStream(io.BufferedWriter):
    """A new file that is written from its beginning to its end."""

    def __init__(
        self,
        path: str | os.PathLike,
        mode: str,
        owner: _WatchedFileSystem,
        digest: HashBeside,
    ) -> None:
        super().__init__(io.FileIO(path, mode.replace("b", "")))
        self._owner = owner
        self._path = path
        self._digest = digest
        self.size = 0
        self._kept = 0  # bytes since pages were dropped

    def write(self, data: Any) -> int:
        assert self.tell() == self.size, "written in another order than hashed"
        whole = memoryview(data).cast("B")
        for start in range(0, len(whole), _BLOCK):
            self._write_block(whole[start : start + _BLOCK])
        return len(whole)

    def _write_block(self, block: memoryview) -> None:
        with self._failures_noted():
            if self._owner.cancelled is not None and self._owner.cancelled.is_set():
                raise SaveCancelledError
            self._digest.begin(block)  # hashed beside the write
            try:
                super().write(block)
            finally:
                self._digest.finish()
        self.size += len(block)
        self._kept += len(block)
        if self._kept >= PAGES_KEPT:
            forget_pages(self.fileno())
            self._kept = 0

    def flush(self) -> None:  # `close` calls it too
        with self._failures_noted():
            super().flush()

    @contextlib.contextmanager
    def _failures_noted(self) -> Generator[None, None, None]:
        try:
            with named(self._path):
                yield
        except (OSError, SaveCancelledError) as error:
            self._owner.error = self._owner.error or error
            raise


class ShardWriter(dcp.FileSystemWriter):
    """One file per rank that has something to write, in this process, synced.

    torch's own loop keeps every tensor until the file is whole, and copies those that are parts of
    larger ones, as the distributed optimizer's are. Its index is what is taken of it.
    """

    def __init__(
        self, folder: Path, *, alone: bool = False, cancelled: threading.Event | None = None
    ) -> None:
        super().__init__(folder, sync_files=True, overwrite=False)
        self._folder = folder
        self.fs = self._watched = _WatchedFileSystem(alone=alone, cancelled=cancelled)

    @property
    def written(self) -> dict[str, FileRecord]:
        """This rank's shards by name."""
        return {k: v for k, v in self._watched.written.items() if k.endswith(".distcp")}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        write = partial(self._write_items, plan.items, planner)
        done.set_result(self._in_words("writing the shards", write) if plan.items else [])
        return done

    def _write_items(self, items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        results = []
        name = f"__{rank()}_0.distcp"
        with self._watched.create_stream(self._folder / name, "xb") as stream, _without_crc():
            for item in items:
                data, offset = planner.resolve_data(item), stream.tell()
                if isinstance(data, io.BytesIO):
                    stream.write(data.getbuffer())
                else:
                    torch.save(_with_own_storage(data.cpu()), stream)
                size = stream.tell() - offset
                results.append(WriteResult(item.index, size, _StorageInfo(name, offset, size)))
            stream.flush()
            with named(self._folder / name):
                os.fsync(stream.fileno())
        return results

    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        self._in_words("writing the index", partial(super().finish, metadata, results))

    def _in_words(self, purpose: str, work: Callable[[], Any]) -> Any:
        """Said here: the limits of this process and disk are not those of the rank that tells."""
        try:
            return work()
        except Exception as error:
            reason = self._watched.error or error
            if isinstance(reason, SaveCancelledError):
                raise reason from error
            raise as_checkpoint_error(purpose, reason) from error


def _with_own_storage(tensor: Tensor) -> Tensor:
    """The same values, in the same memory, as a tensor that torch.save does not take for a part.

    It writes the whole of what a tensor is a part of.

    Args:
        tensor: on the host, contiguous, any shape and dtype.
    """
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    values = torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy())
    return values.view(tensor.dtype).view(tensor.shape)


@dataclass(frozen=True)
class WrittenShare:
    """What one rank has written, as the first rank must know it."""

    plan: SavePlan
    results: list[WriteResult]
    files: dict[str, FileRecord]
    """By name."""


def write_share(
    share: Share, folder: Path, cancelled: threading.Event | None = None
) -> WrittenShare:
    """Write this rank's shards, and the first rank's common state, into an empty folder. Local.

    Raises:
        CheckpointError: it cannot be written.
        SaveCancelledError: the event was set meanwhile.
    """
    shards = ShardWriter(folder, alone=share.is_copied, cancelled=cancelled)
    plan = share.save_plan
    results = shards.write_data(plan, share).value()
    if rank() == 0:
        with told_as("writing the common state"):
            _write_common(share.common, folder)
        with told_as("writing the format marker"):
            _write_marker(folder)
    return WrittenShare(plan, results, shards.written)


def write_index(folder: Path, shares: Sequence[WrittenShare]) -> None:
    """Write where everything is, on the first rank, after all have written their shares.

    Raises:
        CheckpointError: it cannot be written, or a part of a tensor is missing or there twice.
    """
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    with told_as("joining the shards"):
        _, metadata = planner.create_global_plan([share.plan for share in shares])
    ShardWriter(folder).finish(metadata, [share.results for share in shares])


@contextlib.contextmanager
def _without_crc() -> Generator[None, None, None]:
    """The archives' own sums cost as much as all other work, and torch never compares them."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def _write_common(common: dict[str, Any], folder: Path) -> None:
    watched = _WatchedFileSystem()
    try:
        with watched.create_stream(folder / COMMON_STATE_FNAME, "xb") as stream:
            torch.save(common, stream)
    except Exception as error:
        raise watched.error or error from error
    sync_file(folder / COMMON_STATE_FNAME)


def _write_marker(folder: Path) -> None:
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    sync_file(folder / "metadata.json")


def small_files() -> list[str]:
    """The files of a written share, other than shards, that this rank is to hash."""
    return [COMMON_STATE_FNAME, "metadata.json"] if rank() == 0 else []
