"""A new folder that appears whole or not at all, for conversions in both directions.

It is written beside its place under a temporary name, and renamed last, after all of it has reached
the disk: a program that is killed, or a machine that loses its power, leaves nothing that looks
whole and nothing that blocks the next run, which removes what was left.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_dattn.checkpoint import files
from megatron_dattn.errors import CheckpointError
from megatron_dattn.runtime.os_errors import explain

logger = logging.getLogger(__name__)


def check_output(output: Path) -> Path:
    """Make sure that a folder can become new.

    Returns:
        Its absolute path.

    Raises:
        CheckpointError: it is a file, it holds something, or it is the working directory, which
            cannot be replaced.
    """
    folder = output.resolve()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{output} is a file; name a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{output} is not empty; name a new folder")
    if folder == Path.cwd():
        raise CheckpointError(f"{output} is the working directory; name a new folder")
    return folder


def check_room(output: Path, num_bytes: int, what: str) -> None:
    """Raise CheckpointError unless the disk has room for an output that may not exist yet."""
    place = output
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise CheckpointError(
            f"disk full: the {what} needs {num_bytes / 2**30:.2f} GiB, {place} has "
            f"{free / 2**30:.2f} GiB; make room or choose another folder"
        )


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to be filled, which takes the name `output` when the block ends without an error.

    Args:
        output: as `check_output` returns it.

    Raises:
        CheckpointError: it cannot be written, or something has come to be there meanwhile.
    """
    check_output(output)
    temporary = output.with_name(files.temporary_name(f".{output.name}"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output)
        temporary.mkdir()
        try:
            yield temporary
            files.sync_tree(temporary)
            temporary.rename(output)
            files.sync_folder(output.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except CheckpointError as error:
        raise CheckpointError(_with_final_name(str(error), temporary, output)) from error
    except OSError as error:
        reason = _with_final_name(explain(error, output), temporary, output)
        raise CheckpointError(f"{output} cannot be written: {reason}") from error


def _with_final_name(message: str, temporary: Path, output: Path) -> str:
    """No one can look for the temporary folder: it is gone when the message is read."""
    return message.replace(str(temporary), str(output))


def _remove_abandoned(output: Path) -> None:
    """Remove what a killed program left that was writing the same folder."""
    for entry in sorted(output.parent.iterdir()):
        if entry.name.startswith(f".{output.name}.tmp-") and files.is_abandoned(entry):
            logger.warning("removing %s, left behind by a conversion that did not finish", entry)
            shutil.rmtree(entry, ignore_errors=True)
