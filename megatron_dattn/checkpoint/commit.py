"""The commit protocol: a checkpoint exists completely or not at all.

    step-N.tmp-.../  shards, common state, per-rank extra files, all synced
                     every rank hashes its own files, rank 0 writes manifest.json, folder synced
    step-N/          by one rename, parent synced: from here on the checkpoint exists
    latest.json      by temporary file and rename: a hint for people and scripts

Nothing is ever overwritten. A death before the rename leaves a temporary folder that the next save
removes; every rank's failures are exchanged before the next collective, so an error of one is one
CheckpointError on all, the temporary folder is removed and older checkpoints are untouched.
"""

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from megatron_dattn.checkpoint import files, writer
from megatron_dattn.checkpoint.manifest import (
    FileRecord,
    Manifest,
    MisnamedError,
    verify,
    write_manifest,
)
from megatron_dattn.errors import CheckpointError, DiskFullError
from megatron_dattn.runtime.distributed import gather_from_all, rank, world_size
from megatron_dattn.runtime.os_errors import explain, room_in
from megatron_dattn.runtime.rank_errors import on_all_ranks, on_first_rank

logger = logging.getLogger(__name__)

_EXTRA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.[a-z0-9]+")
_RESERVED_NAMES = ("common.pt", "metadata.json", "manifest.json")


def save_checkpoint(
    directory: str | os.PathLike[str],
    step: int,
    sharded_state_dict: ShardedStateDict,
    *,
    facts: Mapping[str, Any],
    extra_files: Mapping[str, bytes] | None = None,
    values: writer.Values | None = None,
    quiet: bool = False,
) -> Path:
    """Save one checkpoint as `<directory>/step-<step>/`. Collective over the world.

    Args:
        directory: the run folder, on a file system that all ranks share; made if missing.
        step: the training step that it belongs to (0 for a conversion).
        sharded_state_dict: megatron-core's sharded state dict of this rank.
        facts: JSON facts for the manifest, the same on every rank (rank 0's are stored).
        extra_files: this rank's own small files, by name; names are unique over the ranks.
        values: of the tensors on the meta device, if there are any; each is asked for once, when
            its turn comes to be written.
        quiet: leave it to the caller to say that it is saved.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: on all ranks alike; older checkpoints and latest.json are untouched then.
    """
    assert dist.is_initialized(), "initialize_distributed first (a world of one is fine)"
    folder = Path(directory)
    extra = dict(extra_files or {})
    final = folder / files.step_folder_name(step)
    on_first_rank(f"preparing {folder}", lambda: _prepare(folder, final))
    on_all_ranks("checking the names of extra files", lambda: _check_names(extra))
    needed = _check_space(folder, sharded_state_dict, extra)
    temporary = Path(on_first_rank("making a folder", lambda: _make_temporary(folder, step)))
    try:
        _fill(temporary, step, sharded_state_dict, dict(facts), extra, values)
        on_first_rank(f"committing {final}", lambda: _commit(temporary, final))
    except CheckpointError as error:
        older = on_first_rank(f"removing {temporary}", lambda: _discard(temporary))
        stays = "; the previous checkpoint stays the latest" if older else ""
        # No one can look for the temporary folder: it is gone when the message is read.
        reason = str(error).replace(str(temporary), str(final))
        if isinstance(error, DiskFullError):
            # Measured once: others write meanwhile, and the error is the same on all ranks.
            room = on_first_rank("measuring the free space", lambda: room_in(folder))
            raise DiskFullError(
                f"disk full: {final} needs {_gib(needed)}, {folder} {room} ({reason}){stays}"
            ) from error
        raise type(error)(f"{reason}{stays}") from error
    on_first_rank("updating the pointer", lambda: _publish(folder, final, step))
    if rank() == 0 and not quiet:
        logger.info("saved %s", final)
    return final


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


def _check_space(folder: Path, state: ShardedStateDict, extra: Mapping[str, bytes]) -> int:
    own = writer.estimate_bytes(state) + sum(map(len, extra.values()))
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


def _fill(
    temporary: Path,
    step: int,
    state: ShardedStateDict,
    facts: dict[str, Any],
    extra: Mapping[str, bytes],
    values: writer.Values | None,
) -> None:
    shards = writer.write_distributed_checkpoint(state, temporary, values)
    on_all_ranks("writing the extra files", lambda: _write_extra(temporary, extra))
    records = on_all_ranks("hashing", lambda: shards | _hash_own(temporary, extra))
    gathered = gather_from_all(records)
    layout = parallel_layout()
    on_first_rank(
        "writing the manifest",
        lambda: _write_manifest(temporary, step, facts, layout, gathered),
    )


def _write_extra(temporary: Path, extra: Mapping[str, bytes]) -> None:
    for name, data in extra.items():
        files.write_synced(temporary / name, data)


def _hash_own(temporary: Path, extra: Mapping[str, bytes]) -> dict[str, FileRecord]:
    names = [*writer.small_files(), *extra]
    return {name: FileRecord(*files.size_and_sha256(temporary / name)) for name in names}


def _write_manifest(
    temporary: Path,
    step: int,
    facts: dict[str, Any],
    layout: dict[str, int],
    gathered: list[dict[str, FileRecord]],
) -> None:
    records: dict[str, FileRecord] = {}
    for owner in gathered:
        records |= owner
    present = {entry.name for entry in temporary.iterdir()}
    if present != records.keys():
        raise CheckpointError(
            f"{temporary.parent} is not shared by all ranks: rank 0 sees {len(present)} of the "
            f"{len(records)} files; save on a file system that every node mounts"
        )
    write_manifest(temporary, Manifest(step=step, facts=facts, layout=layout, files=records))
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
