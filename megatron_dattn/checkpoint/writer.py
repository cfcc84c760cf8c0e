"""Writes a megatron-core distributed checkpoint inside this process.

megatron-core 0.16.1 forks its writers: if one dies, the save waits for ever, and rank 0's own
files are written outside any agreement between the ranks. Here the same format
(`torch_dist`, version 1: `.distcp` shards, `.metadata`, `common.pt`, `metadata.json`) is produced
with torch.distributed.checkpoint's public writer and exchanges, so an error of one rank reaches
all of them, and `megatron.core.dist_checkpointing.load` reads the result.

Tensors without memory (on the meta device) may be given for a state that is larger than the
machine: each one's values are asked for when its turn comes to be written. Shards are hashed on
their way to the disk, not read again for it.
"""

import contextlib
import io
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.msc_utils import MultiStorageClientFeature
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_dattn.checkpoint.files import PAGES_KEPT, HashBeside, forget_pages, sync_file
from megatron_dattn.checkpoint.manifest import FileRecord
from megatron_dattn.errors import CheckpointError
from megatron_dattn.runtime.distributed import rank
from megatron_dattn.runtime.os_errors import named
from megatron_dattn.runtime.rank_errors import as_checkpoint_error, on_all_ranks, on_first_rank

# A tensor is stored as a small zip archive; this covers its headers and alignment.
_BYTES_PER_RECORD = 4096
_PURPOSE = "writing the shards"

Values = Callable[[str, tuple[int, ...]], Tensor]
"""The values of a tensor on the meta device, by its key and its offset in the global tensor."""


class _WatchedFileSystem(FileSystem):
    """Remembers the first failing write, and size and sha256 of every file.

    torch's archive writer hides the operating system's reason behind `unexpected pos 704 vs 598`.
    """

    def __init__(self) -> None:
        self.error: OSError | None = None
        self.written: dict[str, FileRecord] = {}

    @contextlib.contextmanager
    def create_stream(
        self, path: str | os.PathLike, mode: str
    ) -> Generator[io.BufferedWriter, None, None]:
        with HashBeside() as digest, _WatchedStream(path, mode, self, digest) as stream:
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
        self._digest.begin(data)  # hashed beside the write
        try:
            with self._failures_noted():
                count = super().write(data)
        finally:
            self._digest.finish()
        self.size += count
        self._kept += count
        if self._kept >= PAGES_KEPT:
            forget_pages(self.fileno())
            self._kept = 0
        return count

    def flush(self) -> None:  # `close` calls it too
        with self._failures_noted():
            super().flush()

    @contextlib.contextmanager
    def _failures_noted(self) -> Generator[None, None, None]:
        try:
            with named(self._path):
                yield
        except OSError as error:
            self._owner.error = self._owner.error or error
            raise


class ShardWriter(dcp.FileSystemWriter):
    """One file per rank that has something to write, in this process, synced."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=True, overwrite=False)
        self.fs = self._watched = _WatchedFileSystem()

    @property
    def written(self) -> dict[str, FileRecord]:
        """This rank's shards by name."""
        return {k: v for k, v in self._watched.written.items() if k.endswith(".distcp")}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if not plan.items:
            nothing: Future[list[WriteResult]] = Future()
            nothing.set_result([])
            return nothing
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise self._in_words(error) from error

    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        try:
            super().finish(metadata, results)
        except Exception as error:
            raise self._in_words(error) from error

    def _in_words(self, error: Exception) -> CheckpointError:
        """Said here: the limits of this process and disk are not those of the rank that tells."""
        return as_checkpoint_error(_PURPOSE, self._watched.error or error)


class _SavePlanner(MCoreSavePlanner):
    """Asks for the values of tensors on the meta device one by one."""

    def __init__(self, values: Values | None) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._values = values

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = super().lookup_object(index)
        if not (isinstance(found, Tensor) and found.is_meta):
            return found
        assert self._values is not None, f"{index.fqn} has no values"
        assert index.offset is not None
        value = self._values(index.fqn, tuple(index.offset))
        assert value.dtype == found.dtype, (index, value.dtype, found.dtype)
        return value.reshape(found.shape)


def write_distributed_checkpoint(
    state: ShardedStateDict, folder: Path, values: Values | None = None
) -> dict[str, FileRecord]:
    """Write a sharded state dict into an empty folder. Collective over the world.

    Args:
        state: megatron-core's sharded state dict; what is not sharded is stored by rank 0.
        values: of the tensors on the meta device, if there are any; each is asked for once.

    Returns:
        Size and sha256 of the shards that this rank wrote.

    Raises:
        CheckpointError: on all ranks, if any of them failed; the folder is then worthless.
    """
    MultiStorageClientFeature.disable()  # it is on wherever its package is installed
    # Its last step, the integrity check, raises on rank 0 alone.
    sharded, common = on_all_ranks("checking the shards", lambda: save_preprocess(state))
    on_first_rank("writing the common state", lambda: _write_common(common, folder))
    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    tensors = mcore_to_pyt_state_dict(flat, is_loading=False)
    shards = ShardWriter(folder)
    try:
        with _without_crc():
            dcp.save(tensors, storage_writer=shards, planner=_SavePlanner(values))
    except dcp.CheckpointException as error:
        raise first_failure(_PURPOSE, error) from error
    on_first_rank("writing the format marker", lambda: _write_marker(folder))
    return shards.written


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


def first_failure(purpose: str, error: dcp.CheckpointException) -> CheckpointError:
    """torch's report of all failing ranks (a BaseException) as one error of this package."""
    if not error.failures:
        return CheckpointError(f"{purpose} failed: {error.args[0]}")
    failing = min(error.failures)
    reason = error.failures[failing][0]
    if not isinstance(reason, Exception):
        raise reason  # an interrupt, not a failure
    local = as_checkpoint_error(purpose, reason)
    return type(local)(f"rank {failing}: {local}")


def small_files() -> list[str]:
    """The files of a written checkpoint, other than shards, that this rank is to hash."""
    return [COMMON_STATE_FNAME, ".metadata", "metadata.json"] if rank() == 0 else []


def estimate_bytes(state: ShardedStateDict) -> int:
    """Bytes that this rank will write, headers included; objects other than tensors are small."""
    total = 0
    for value in nested_values(state):
        if isinstance(value, ShardedTensor) and is_main_replica(value.replica_id):
            assert value.data is not None, value.key
            total += value.data.numel() * value.data.element_size()
        total += _BYTES_PER_RECORD
    return total
