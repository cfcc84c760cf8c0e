"""Checkpoints as a person could make them: content that is wrong under sums that are right."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dattn.checkpoint.manifest import MANIFEST_FILE, _render


def forge_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest's body in place; it is canonical and has the right sum again."""
    path = folder / MANIFEST_FILE
    body = json.loads(path.read_bytes())
    del body["format"], body["sha256"]
    change(body)
    path.write_bytes(_render(body))


def forge_file(folder: Path, name: str, data: bytes) -> None:
    """Replace or add a file, and let the manifest list it as it is now."""
    (folder / name).write_bytes(data)
    record = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge_manifest(folder, lambda body: body["files"].update({name: record}))


def forge_index(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change the unpickled `.metadata`, in place or into what is given back."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    changed = change(metadata)
    forge_file(folder, ".metadata", pickle.dumps(metadata if changed is None else changed))


class RunsCode:
    """Leaves a file behind where it is unpickled without care."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._marker,)
