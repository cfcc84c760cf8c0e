"""Folders that a run writes into: what is refused before anything is written.

Names are judged by their letters when the configuration is read, places by what is there when a run
starts, or would start.
"""

import os
import re
import unicodedata
from pathlib import Path

from megatron_dattn.errors import ConfigError, quoted

# As checkpoint/files.py names them, which loads megatron-core.
_STEP_FOLDER = re.compile(r"step-\d{7,}")
_MANIFEST = "manifest.json"
_MAX_NAME_BYTES = 200
"""Of one part of a path: file systems take 255, and temporary names are longer than final ones."""


def check_name(setting: str, name: str | None) -> None:
    """Refuse a name that would end in a strange place, or that log lines and files cannot hold.

    Raises:
        ConfigError: naming the setting and what is wrong.
    """
    if name is None:
        return
    if not name.strip():
        raise ConfigError(f"{setting} is empty: leave it out, or name a folder")
    # Control characters break lines; surrogates stand for bytes that are no UTF-8.
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise ConfigError(
            f"{setting} {quoted(name)} holds a control character, or bytes that are not UTF-8; "
            "name another folder"
        )
    longest = max(len(part.encode()) for part in Path(name).parts or ("",))
    if longest > _MAX_NAME_BYTES:
        raise ConfigError(
            f"{setting} {quoted(name)} has a part of {longest} bytes; at most {_MAX_NAME_BYTES} "
            "are possible"
        )


def check_run_folder(setting: str, name: str | None) -> None:
    """`check_name`, and no name of a single checkpoint.

    Raises:
        ConfigError: likewise.
    """
    check_name(setting, name)
    if name is not None and _STEP_FOLDER.fullmatch(Path(name).name):
        raise ConfigError(
            f"{setting} {quoted(name)} is the name of one checkpoint; name the run folder that "
            "holds, or will hold, it"
        )


def check_place(setting: str, folder: Path) -> None:
    """Check that a folder, or the first one above it that exists, takes new files.

    Raises:
        ConfigError: naming the setting and what is in the way.
    """
    for above in folder.absolute().parents:
        if _STEP_FOLDER.fullmatch(above.name) and (above / _MANIFEST).exists():
            raise ConfigError(
                f"{setting} {folder} lies in the checkpoint {above}, which must hold nothing but "
                "its own files; name another folder"
            )
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.exists():
        raise ConfigError(f"{setting} {folder}: {there} is a link that leads nowhere; remove it")
    if not there.is_dir():
        raise ConfigError(f"{setting} {folder}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{setting} {folder}: {there} cannot be written into")
