"""The manifest of a checkpoint: which files it consists of and what it is a checkpoint of.

`manifest.json` is written last into a checkpoint folder. It lists every file with size and sha256
and carries the facts (model, tokenizer, stage, progress) by which a checkpoint is accepted or
refused. It is its own witness too: a sha256 over its canonical form, and no byte may deviate from
that form.
"""

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_dattn.checkpoint import files
from megatron_dattn.checkpoint.manifest_fields import check_fields
from megatron_dattn.errors import CheckpointError
from megatron_dattn.runtime.progress import Advance, ByteProgress, unseen
from megatron_dattn.runtime.untrusted_file import (
    MAX_BYTES,
    open_plain,
    parse_json,
    read_plain,
    show,
)

MANIFEST_FILE = "manifest.json"
FORMAT = "megatron_dattn/1"

_ABSENT = "<absent>"


class MisnamedError(CheckpointError):
    """A sound checkpoint in a folder that is named after another step."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must look like."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json; every field is plain JSON."""

    step: int
    facts: dict[str, Any]
    """What this is a checkpoint of: model, modules, tokenizer, stage, progress, ..."""
    layout: dict[str, int]
    """Parallel sizes of the run that wrote it."""
    files: dict[str, FileRecord]
    """Every file of the folder but the manifest, by name."""
    versions: dict[str, str] = dataclasses.field(default_factory=lambda: current_versions())
    created: str = dataclasses.field(default_factory=lambda: datetime.now(UTC).isoformat())

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules whose weights it holds."""
        return tuple(self.facts.get("modules", ()))


def current_versions() -> dict[str, str]:
    """Versions of the programs that write a checkpoint now."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "megatron-core", "megatron_dattn"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and sync manifest.json into a folder that has none yet."""
    files.write_synced(folder / MANIFEST_FILE, _render(dataclasses.asdict(manifest)))


def _render(body: dict[str, Any]) -> bytes:
    plain = json.dumps({"format": FORMAT, **body}, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(plain.encode()).hexdigest()
    document = {"format": FORMAT, **body, "sha256": digest}
    return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()


def read_manifest(path: str | os.PathLike[str], *, any_name: bool = False) -> Manifest:
    """The manifest of a checkpoint folder, itself verified.

    Args:
        any_name: whether the folder may be named after another step than it holds.

    Raises:
        CheckpointError: if it is missing, damaged, or of an unknown format.
        MisnamedError: it is not that of the step that the folder is named after.
    """
    folder = Path(path)
    file = folder / MANIFEST_FILE
    try:
        data = read_plain(file, max_bytes=MAX_BYTES, follow_links=False)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{path} is no checkpoint of this program: it has no {MANIFEST_FILE}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    body = _body(data, file)
    check_fields(body, str(file), MANIFEST_FILE)
    records = {name: FileRecord(**record) for name, record in body.pop("files").items()}
    manifest = Manifest(files=records, **body)
    if not any_name:
        _check_name(folder, manifest.step)
    return manifest


def _body(data: bytes, file: Path) -> dict[str, Any]:
    """What a manifest says, if it says it in the canonical form and with the right sum."""
    damaged = CheckpointError(f"{file} is damaged; use another checkpoint of the run")
    try:
        body = parse_json(data)
        written_by = body.pop("format")
        del body["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged from error
    if written_by != FORMAT:
        raise CheckpointError(
            f"{file} has format {show(written_by)}, this version reads {FORMAT!r}; load it with "
            "the version that wrote it"
        )
    if _render(body) != data:
        raise damaged
    return body


def _check_name(folder: Path, step: int) -> None:
    """Raise MisnamedError if a folder is named after another step than it holds.

    Folders of other names (a copy, a save in progress) are what their manifest says.
    """
    named = files.step_of(Path(os.path.abspath(folder)).name)
    if named not in (None, step):
        raise MisnamedError(
            f"{folder} is named after step {named}, but holds the checkpoint of step {step}; "
            f"rename it to {files.step_folder_name(step)}, or move it away if that is there"
        )


def verify(
    path: str | os.PathLike[str], *, sums: bool = True, progress: ByteProgress = unseen
) -> Manifest:
    """Check a checkpoint against its manifest.

    Args:
        path: the checkpoint folder itself (`.../step-0000100`).
        sums: also compare sha256, which reads every file; sizes are always compared.
        progress: of reading them.

    Raises:
        CheckpointError: naming the first missing or damaged file.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    verify_files(folder, manifest, list(manifest.files), sums=sums, progress=progress)
    return manifest


def verify_files(
    folder: Path,
    manifest: Manifest,
    names: Collection[str],
    *,
    sums: bool,
    progress: ByteProgress = unseen,
) -> None:
    """Like `verify`, for some of the files: ranks share the work of a large checkpoint."""
    num_bytes = sum(manifest.files[name].size for name in names)
    with (progress if sums else unseen)(f"checking {folder.name}", num_bytes) as advance:
        for name in names:
            _verify_file(folder / name, manifest.files[name], advance if sums else None)


def _verify_file(file: Path, expected: FileRecord, advance: Advance | None) -> None:
    """Compare the size; where somebody is told of bytes that are read, also the sum."""
    try:
        with open_plain(file, follow_links=False) as opened:
            size = os.fstat(opened.fileno()).st_size
        if size != expected.size:
            raise CheckpointError(f"{file} is damaged: {size} bytes instead of {expected.size}")
        if advance is not None and files.size_and_sha256(file, advance)[1] != expected.sha256:
            raise CheckpointError(f"{file} is damaged: its sha256 differs from the manifest's")
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error


def require_listed(folder: Path, manifest: Manifest, names: Collection[str]) -> None:
    """Raise CheckpointError unless a manifest lists these files: its sums cover no others."""
    for name in names:
        if name not in manifest.files:
            raise CheckpointError(
                f"the manifest of {folder} does not list {name}; use another checkpoint of the run"
            )


def read_listed(folder: Path, manifest: Manifest, name: str) -> bytes:
    """A small file of a checkpoint, which its sums have covered.

    Raises:
        CheckpointError: the manifest does not list it, or it is no longer as listed.
    """
    require_listed(folder, manifest, (name,))
    _verify_file(folder / name, manifest.files[name], None)
    try:
        return read_plain(folder / name, max_bytes=manifest.files[name].size, follow_links=False)
    except OSError as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error.strerror}") from error
