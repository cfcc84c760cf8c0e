"""Finds the checkpoint to go on with, and deletes those that are no longer needed.

The folder is scanned, newest first; the first checkpoint that agrees with its manifest wins.
`latest.json` is a hint for people: an empty, wrong or stale one changes nothing. A damaged
checkpoint, or one in a folder that is named after another step, is passed over loudly; if none is
left the run must not start afresh in silence.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_dattn.checkpoint import files
from megatron_dattn.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    read_manifest,
    verify,
    verify_files,
)
from megatron_dattn.errors import CheckpointError
from megatron_dattn.runtime.distributed import rank, world_size
from megatron_dattn.runtime.progress import ByteProgress, unseen
from megatron_dattn.runtime.rank_errors import on_all_ranks, on_first_rank
from megatron_dattn.runtime.untrusted_file import JsonFields, read_json_object, show

logger = logging.getLogger(__name__)

# Names that tell a folder of somebody else, and whose it is.
_FOREIGN = {
    "latest_checkpointed_iteration.txt": "a Megatron-LM checkpoint folder",
    "metadata.json": "a bare distributed checkpoint without manifest",
    ".metadata": "a bare distributed checkpoint without manifest",
    "model.safetensors": "a Hugging Face model",
    "model.safetensors.index.json": "a Hugging Face model",
    "pytorch_model.bin": "a Hugging Face model",
    "config.json": "a Hugging Face model",
}
_MIN_KEPT = 2
_POINTER_BYTES = 64 * 2**10


@dataclass(frozen=True)
class FoundCheckpoint:
    """A verified checkpoint and why newer ones were passed over (empty if it is the newest)."""

    path: Path
    manifest: Manifest
    passed_over: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return self.manifest.step


def find_checkpoint(
    directory: str | os.PathLike[str], verify: bool = True, progress: ByteProgress = unseen
) -> FoundCheckpoint | None:
    """The newest sound checkpoint of a run folder. Local: nothing is communicated.

    Args:
        directory: a run folder, or one checkpoint folder (`.../step-0000100`) itself.
        verify: compare sha256 sums; sizes are always compared.
        progress: of reading what is compared.

    Returns:
        None if there is no folder or no checkpoint was ever committed in it.

    Raises:
        CheckpointError: if there are checkpoints but none is usable, if latest.json says that
            there were some, or if the folder belongs to another program.
    """

    def check(path: Path) -> Manifest:
        return _verify_whole(path, verify, progress)

    return _search(Path(directory), check, _candidates)


def find_step(
    directory: str | os.PathLike[str], step: int, progress: ByteProgress = unseen
) -> FoundCheckpoint:
    """The checkpoint of one step of a run folder, and no other. Local: nothing is communicated.

    Raises:
        CheckpointError: there is none of that step (naming the steps that there are), or it is
            damaged.
    """
    folder = Path(directory)
    path = folder / files.step_folder_name(step)
    if not os.path.lexists(path):
        there = ", ".join(map(str, steps_of(folder))) or "none"
        raise CheckpointError(
            f"{folder} holds no checkpoint of step {step}; steps: {there}"
            + "".join(f"; {_spell(*it)}" for it in misplaced_checkpoints(folder) if it[0] == step)
        )
    return FoundCheckpoint(path, _verify_whole(path, True, progress))


def steps_of(folder: Path) -> list[int]:
    """The steps whose checkpoints a run folder holds, sound or not, in order.

    A folder that is named after another step than it holds counts for neither.
    """
    if not folder.is_dir():
        return []
    misplaced = {path for _, path in misplaced_checkpoints(folder)}
    return sorted(step for step, path in _step_folders(folder) if path not in misplaced)


def _step_folders(folder: Path) -> list[tuple[int, Path]]:
    named = ((files.step_of(path.name), path) for path in folder.iterdir())
    return [(step, path) for step, path in named if step is not None]


def find_checkpoint_together(
    directory: str | os.PathLike[str], verify: bool = True
) -> FoundCheckpoint | None:
    """Like `find_checkpoint`, with the same answer on all ranks. Collective over the world.

    Rank 0 reads the folder; every rank hashes its share of the files.
    """

    def check(path: Path) -> Manifest:
        manifest = on_first_rank(f"reading {path}", lambda: read_manifest(path))
        share = sorted(manifest.files)[rank() :: world_size()]
        on_all_ranks(f"verifying {path}", lambda: verify_files(path, manifest, share, sums=verify))
        return manifest

    def candidates(folder: Path) -> list[Path]:
        return on_first_rank(f"reading {folder}", lambda: _candidates(folder))

    return _search(Path(directory), check, candidates)


def _verify_whole(path: Path, sums: bool, progress: ByteProgress) -> Manifest:
    return verify(path, sums=sums, progress=progress)


def _search(
    folder: Path, check: Callable[[Path], Manifest], candidates: Callable[[Path], list[Path]]
) -> FoundCheckpoint | None:
    problems: list[str] = []
    for path in candidates(folder):
        try:
            manifest = check(path)
        except CheckpointError as error:
            problems.append(str(error))
            if rank() == 0:
                logger.warning("PASSING OVER %s: %s", path, error)
            continue
        if problems and rank() == 0:
            logger.warning("GOING BACK to %s: newer checkpoints are damaged or misnamed", path)
        if rank() == 0 and path != folder:
            _speak_of_newer(folder, manifest.step, silent=bool(problems))
        return FoundCheckpoint(path, manifest, tuple(problems))
    if problems:
        raise CheckpointError(
            f"no checkpoint in {folder} is usable ({'; '.join(problems)}); repair one, or move "
            "the folder away to start afresh"
        )
    return None


def _candidates(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first. Raises CheckpointError for folders of another kind."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, not a folder of checkpoints")
    has_manifest = os.path.lexists(folder / MANIFEST_FILE)
    is_step = files.step_of(folder.name) is not None
    if is_step and not has_manifest:
        raise CheckpointError(f"{folder} is damaged: {MANIFEST_FILE} is missing")
    steps = _step_folders(folder)
    if is_step or (has_manifest and not steps):
        return [folder]
    if not steps:
        _refuse_empty(folder)
    return [path for _, path in sorted(steps, reverse=True)]


def misplaced_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints below a run folder whose own folders are not named after their steps.

    What the program itself has set aside as damaged, or is about to write, is none.
    """
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        if files.is_passing(path.name) or not path.is_dir():
            continue
        try:
            step = read_manifest(path, any_name=True).step
        except CheckpointError:
            continue
        if path.name != files.step_folder_name(step):
            found.append((step, path))
    return sorted(found)


def _spell(step: int, path: Path) -> str:
    return f"{path} holds step {step}: rename it to {files.step_folder_name(step)}"


def _refuse_empty(folder: Path) -> None:
    """Raise unless a folder without checkpoints is one where none was ever committed."""
    for name, owner in _FOREIGN.items():
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder} holds {owner} ({name}), not checkpoints of this program; give another "
                "folder, or convert it with tools/convert_checkpoint.py"
            )
    if (folder / files.LATEST_FILE).exists():
        raise CheckpointError(
            f"{folder / files.LATEST_FILE} says that there were checkpoints, but none is left; "
            "remove it to start afresh"
        )
    if misplaced := misplaced_checkpoints(folder):
        raise CheckpointError(
            f"{folder} holds no checkpoint that is named after its step; "
            f"{'; '.join(_spell(*found) for found in misplaced)}, or move it away to start afresh"
        )
    if any(files.is_temporary(entry.name) for entry in folder.iterdir()):
        logger.warning("%s holds an unfinished first save and no checkpoint", folder)


def _speak_of_newer(folder: Path, step: int, *, silent: bool) -> None:
    """Say that another checkpoint may be meant than the one of this step; that changes nothing.

    Args:
        silent: whether latest.json may differ, as it has been said already that newer ones do.
    """
    for newer, path in misplaced_checkpoints(folder):
        if newer > step and files.step_of(path.name) is None:
            logger.warning("NOT TAKEN: %s, to go on from there", _spell(newer, path))
    pointer = folder / files.LATEST_FILE
    try:
        content = read_json_object(pointer, CheckpointError, max_bytes=_POINTER_BYTES)
        named = JsonFields(content, str(pointer), CheckpointError).text("checkpoint")
    except FileNotFoundError:
        return
    except CheckpointError as error:
        logger.warning("%s; the newest sound checkpoint is taken", error)
        return
    taken = files.step_folder_name(step)
    if named != taken and not silent:
        logger.warning("%s names %s, the newest is %s", pointer, show(named), taken)


def prune(
    directory: str | os.PathLike[str], keep_last: int, *, newest: int | None = None
) -> list[Path]:
    """Delete all but the newest checkpoints of a run folder; call it on one rank.

    The newest `keep_last` (at least two) whose manifest and file sizes are right stay; sums are
    not read again. Damaged ones newer than the oldest kept stay too, as evidence. What is not
    surely the checkpoint of the step that it is named after is neither counted nor deleted.

    Args:
        newest: the step that was saved last. Checkpoints of later steps were passed over when the
            run went back: they are neither counted nor deleted, as their sums may be wrong.

    Returns:
        The deleted folders.
    """
    folder = Path(directory)
    sound = 0
    deleted = []
    for path in _candidates(folder):
        try:
            manifest = _require_identity(path)
            if newest is not None and manifest.step > newest:
                continue
            if sound >= max(_MIN_KEPT, keep_last):
                files.remove_folder(path)
                deleted.append(path)
                continue
            verify(path, sums=False)
            sound += 1
        except CheckpointError as error:
            logger.warning("%s is not counted among the kept checkpoints: %s", path, error)
    return deleted


def _require_identity(path: Path) -> Manifest:
    """The manifest of a folder of the run's own.

    Raises:
        CheckpointError: it is a link, or does not surely hold the step of its name.
    """
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link, and what it leads to is not deleted")
    return read_manifest(path)
