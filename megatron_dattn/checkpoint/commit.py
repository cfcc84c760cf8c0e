"""The commit protocol: a checkpoint exists completely or not at all.

    step-N.tmp-.../  every rank writes and hashes its shards and small files, all synced
                     rank 0 joins them by an index, writes manifest.json, folder synced
    step-N/          by one rename, parent synced: from here on the checkpoint exists
    latest.json      by temporary file and rename: a hint for people and scripts

Nothing is ever overwritten. A death before the rename leaves a temporary folder that the next save
removes; every rank's failures are exchanged before the next collective, so an error of one is one
CheckpointError on all, the temporary folder is removed and older checkpoints are untouched.

`save_steps` is the protocol. What the ranks do together happens in it; what each does by itself it
hands out, to be done at once (`run_to_end`) or by a thread beside training (background.py).
"""

import json
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from megatron_dattn.checkpoint import files, writer
from megatron_dattn.checkpoint.chunk_bytes import HostMemory
from megatron_dattn.checkpoint.manifest import (
    FileRecord,
    Manifest,
    MisnamedError,
    verify,
    write_manifest,
)
from megatron_dattn.checkpoint.share import Share, Values
from megatron_dattn.errors import CheckpointError, DiskFullError, UserError
from megatron_dattn.runtime.distributed import (
    gather_from_all,
    gather_on_first_rank,
    rank,
    world_size,
)
from megatron_dattn.runtime.os_errors import explain, room_in
from megatron_dattn.runtime.rank_errors import on_all_ranks, on_first_rank, told_as

logger = logging.getLogger(__name__)

T = TypeVar("T")

_EXTRA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.[a-z0-9]+")
_RESERVED_NAMES = ("common.pt", "metadata.json", "manifest.json")


@dataclass(frozen=True)
class LocalWork:
    """Work of this rank alone, on its files: no collectives, so any thread may do it."""

    purpose: str
    """The beginning of the message if it fails."""
    do: Callable[[], Any]


Steps = Generator[LocalWork, Any, T]
"""Collective work that hands out local work, and is given its result or the error of any rank."""


def save_checkpoint(
    directory: str | os.PathLike[str],
    step: int,
    sharded_state_dict: ShardedStateDict,
    *,
    facts: Mapping[str, Any],
    extra_files: Mapping[str, bytes] | None = None,
    values: Values | None = None,
    quiet: bool = False,
) -> Path:
    """Save one checkpoint as `<directory>/step-<step>/`. Collective over the world.

    Args:
        values: of the tensors on the meta device, if there are any; each is asked for once, when
            its turn comes to be written.
        quiet: leave it to the caller to say that it is saved.

    The rest is as for `save_steps`.
    """
    path = run_to_end(
        save_steps(
            directory, step, sharded_state_dict, facts=facts, extra_files=extra_files, values=values
        )
    )
    if rank() == 0 and not quiet:
        logger.info("saved %s", path)
    return path


def run_to_end(steps: Steps[T]) -> T:
    """Do all of it now, in this thread. Collective over the world."""
    work = next(steps)
    while True:
        try:
            work = go_on(steps, work.purpose, work.do)
        except StopIteration as end:
            return end.value


def go_on(steps: Steps[Any], purpose: str, result: Callable[[], Any]) -> LocalWork:
    """Hand over how this rank's work went, as soon as it has ended on all ranks. Collective.

    Returns:
        The next work of this rank.

    Raises:
        StopIteration: that was the last; its value is the result of all.
        UserError: on all ranks, if the work failed on any.
    """
    try:
        outcome = on_all_ranks(purpose, result)
    except UserError as error:
        return steps.throw(error)
    return steps.send(outcome)


def save_steps(
    directory: str | os.PathLike[str],
    step: int,
    sharded_state_dict: ShardedStateDict,
    *,
    facts: Mapping[str, Any],
    extra_files: Mapping[str, bytes] | None = None,
    values: Values | None = None,
    memory: HostMemory | None = None,
    cancelled: threading.Event | None = None,
) -> Steps[Path]:
    """Save one checkpoint as `<directory>/step-<step>/`, step by step. Collective over the world.

    Args:
        directory: the run folder, on a file system that all ranks share; made if missing.
        step: the training step that it belongs to (0 for a conversion).
        sharded_state_dict: megatron-core's sharded state dict of this rank.
        facts: JSON facts for the manifest, the same on every rank (rank 0's are stored).
        extra_files: this rank's own small files, by name; names are unique over the ranks.
        values: of the tensors on the meta device.
        memory: of the host, for a copy of this rank's share: once the first work is handed out, the
            state may change. None: it stays as it is until the end.
        cancelled: once it is set, this rank writes no more shards; not for one that goes on.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: on all ranks alike; older checkpoints and latest.json are untouched then.
    """
    assert dist.is_initialized(), "initialize_distributed first (a world of one is fine)"
    folder = Path(directory)
    facts, extra = dict(facts), dict(extra_files or {})
    final = folder / files.step_folder_name(step)
    on_first_rank(f"preparing {folder}", lambda: _prepare(folder, final))
    on_all_ranks("checking the names of extra files", lambda: _check_names(extra))
    share = on_all_ranks("checking the shards", lambda: Share(sharded_state_dict, values))
    needed = _check_space(folder, share, extra)
    temporary = Path(on_first_rank("making a folder", lambda: _make_temporary(folder, step)))
    try:
        if memory is not None:
            on_all_ranks("copying the state to host memory", lambda: share.copy_to(memory))
        own = yield LocalWork("writing", lambda: _write_own(temporary, share, extra, cancelled))
        all_own = gather_on_first_rank(own)
        layout = parallel_layout()
        yield _on_first_rank(
            f"committing {final}", lambda: _finish(temporary, final, step, facts, layout, all_own)
        )
    except UserError as error:
        raise _undone(error, temporary, final, needed) from error
    yield _on_first_rank("updating the pointer", lambda: _publish(folder, final, step))
    return final


def _on_first_rank(purpose: str, do: Callable[[], Any]) -> LocalWork:
    return LocalWork(purpose, do if rank() == 0 else lambda: None)


def _undone(error: UserError, temporary: Path, final: Path, needed: int) -> UserError:
    """Remove what was written; the error to raise in place of the one that ended the save."""
    older = on_first_rank(f"removing {temporary}", lambda: _discard(temporary))
    stays = "; the previous checkpoint stays the latest" if older else ""
    # No one can look for the temporary folder: it is gone when the message is read.
    reason = str(error).replace(str(temporary), str(final))
    if not isinstance(error, DiskFullError):
        return type(error)(f"{reason}{stays}")
    # Measured once: others write meanwhile, and the error is the same on all ranks.
    folder = final.parent
    room = on_first_rank("measuring the free space", lambda: room_in(folder))
    return DiskFullError(
        f"disk full: {final} needs {_gib(needed)}, {folder} {room} ({reason}){stays}"
    )


def _prepare(folder: Path, final: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    if not os.path.lexists(final):
        return
    try:
        verify(final)
    except MisnamedError as error:
        aside = final.with_name(f"{final.name}.misnamed-{uuid.uuid4().hex[:12]}")
        final.rename(aside)
        logger.warning("%s; it is now %s", error, aside)
        return
    except CheckpointError as error:
        aside = final.with_name(files.damaged_name(final.name))
        final.rename(aside)
        logger.warning("%s; the damaged checkpoint is now %s", error, aside)
        return
    raise CheckpointError(
        f"{final} exists and is never overwritten; resume from it or save into another folder"
    )


def remove_abandoned(folder: Path) -> None:
    """Remove what dead writers left in a run folder: temporary folders and unfinished deletions."""
    for entry in sorted(folder.iterdir()):
        try:
            dead = files.is_abandoned(entry)
            if dead:
                logger.warning("removing %s, left behind by a save that did not finish", entry)
            if dead or entry.name.startswith(files.TRASH_PREFIX):
                shutil.rmtree(entry)
        except OSError as error:  # it can wait for the next save
            logger.warning("%s cannot be removed: %s", entry, error)


def _check_names(extra: Mapping[str, bytes]) -> None:
    for name in extra:
        if not _EXTRA_NAME.fullmatch(name) or name in _RESERVED_NAMES:
            raise CheckpointError(f"{name!r} cannot be the name of an extra file")


def _check_space(folder: Path, share: Share, extra: Mapping[str, bytes]) -> int:
    own = share.num_bytes + sum(map(len, extra.values()))
    needed = sum(gather_from_all(own))

    def check() -> None:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise CheckpointError(
                f"disk full: a checkpoint needs {_gib(needed)}, {folder} has {_gib(free)}; "
                "make room and save again"
            )

    on_first_rank("checking the free space", check)
    return needed


def _gib(size: int) -> str:
    return f"{size / 2**30:.3f} GiB"


def _make_temporary(folder: Path, step: int) -> str:
    temporary = folder / files.temporary_name(files.step_folder_name(step))
    temporary.mkdir()
    return str(temporary)


def _write_own(
    temporary: Path,
    share: Share,
    extra: Mapping[str, bytes],
    cancelled: threading.Event | None,
) -> writer.WrittenShare:
    written = writer.write_share(share, temporary, cancelled)
    with told_as("writing the extra files"):
        _write_extra(temporary, extra)
    with told_as("hashing"):
        hashed = _hash_own(temporary, [*writer.small_files(), *extra])
    return replace(written, files=written.files | hashed)


def _finish(
    temporary: Path,
    final: Path,
    step: int,
    facts: dict[str, Any],
    layout: dict[str, int],
    shares: list[writer.WrittenShare],
) -> None:
    """What the first rank does when all have written their shares."""
    writer.write_index(temporary, shares)
    with told_as("hashing"):
        records = _hash_own(temporary, [writer.INDEX_FILE])
    for share in shares:
        records |= share.files
    with told_as("writing the manifest"):
        _write_manifest(temporary, Manifest(step=step, facts=facts, layout=layout, files=records))
    _commit(temporary, final)


def _write_extra(temporary: Path, extra: Mapping[str, bytes]) -> None:
    for name, data in extra.items():
        files.write_synced(temporary / name, data)


def _hash_own(temporary: Path, names: Sequence[str]) -> dict[str, FileRecord]:
    return {name: FileRecord(*files.size_and_sha256(temporary / name)) for name in names}


def _write_manifest(temporary: Path, manifest: Manifest) -> None:
    present = {entry.name for entry in temporary.iterdir()}
    if present != manifest.files.keys():
        raise CheckpointError(
            f"{temporary.parent} is not shared by all ranks: rank 0 sees {len(present)} of the "
            f"{len(manifest.files)} files; save on a file system that every node mounts"
        )
    write_manifest(temporary, manifest)
    files.sync_folder(temporary)


def parallel_layout() -> dict[str, int]:
    """World size and, where model parallelism is set up, the sizes of its axes: 1 for one rank."""
    layout = {"world": world_size()}
    if world_size() == 1:
        layout |= dict.fromkeys(("tensor", "pipeline", "context", "data"), 1)
    elif parallel_state.model_parallel_is_initialized():
        layout["tensor"] = parallel_state.get_tensor_model_parallel_world_size()
        layout["pipeline"] = parallel_state.get_pipeline_model_parallel_world_size()
        layout["context"] = parallel_state.get_context_parallel_world_size()
        layout["data"] = parallel_state.get_data_parallel_world_size()
    return layout


def _commit(temporary: Path, final: Path) -> None:
    if os.path.lexists(final):  # another job came first; an empty folder would be replaced silently
        raise CheckpointError(f"{final} appeared during the save: two jobs share {final.parent}")
    temporary.rename(final)
    files.sync_folder(final.parent)


def _discard(temporary: Path) -> bool:
    """Remove an unfinished checkpoint; whether there is an older one."""
    try:
        shutil.rmtree(temporary)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("%s cannot be removed: %s", temporary, error)
    return any(files.step_of(entry.name) is not None for entry in temporary.parent.iterdir())


def _publish(folder: Path, final: Path, step: int) -> None:
    pointer = json.dumps({"checkpoint": final.name, "step": step}) + "\n"
    try:
        files.replace_synced(folder / files.LATEST_FILE, pointer.encode())
    except OSError as error:
        # The checkpoint is committed and is found without the pointer.
        logger.warning(
            "%s is saved, but %s is not updated: %s", final, files.LATEST_FILE, explain(error)
        )
