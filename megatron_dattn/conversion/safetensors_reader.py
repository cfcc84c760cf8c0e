"""Reads a Hugging Face checkpoint folder tensor by tensor, from safetensors only.

Pickled weights (.bin) are refused: loading them runs code. Nothing is read before it is asked
for, so a large checkpoint costs one tensor of memory at a time.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dattn.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: is this a Hugging Face folder?") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


class SafetensorsFolder:
    """The tensors of one Hugging Face folder, by name.

    Args:
        prefix: removed from the names that carry it; the other names are then hidden. It lets a
            vision encoder be read out of a full dual-encoder checkpoint.

    Raises:
        CheckpointError: no safetensors, a shard that is missing or damaged, an index that does not
            list what the shards hold.
    """

    def __init__(self, folder: Path, *, prefix: str = "") -> None:
        self.folder = folder
        self._prefix = prefix
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        """In safetensors' words: BF16, F32, ..."""
        index = self._index()
        for path in self._shards(index):
            self._scan(path, index)

    def load(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(self._prefix + name)

    def _index(self) -> dict[str, str] | None:
        """The file of every tensor as the folder's index has it; None without index."""
        path = self.folder / INDEX_FILE
        if not path.is_file():
            return None
        index = read_json(path).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{path} lists no weights")
        return index

    def _shards(self, index: dict[str, str] | None) -> list[Path]:
        names = {SINGLE_FILE} if index is None else set(index.values())
        paths = [self.folder / name for name in sorted(names)]
        for path in paths:
            if path.is_file():
                continue
            if index is not None:
                raise CheckpointError(
                    f"{path} is missing, but {INDEX_FILE} lists it; download it again"
                )
            raise CheckpointError(
                f"{path} is missing; weights are read from safetensors only "
                "(convert .bin files with save_pretrained first)"
            )
        return paths

    def _scan(self, path: Path, index: dict[str, str] | None) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                slices = {name: file.get_slice(name) for name in names}
                shapes = {name: tuple(slices[name].get_shape()) for name in names}
                dtypes = {name: slices[name].get_dtype() for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged or truncated ({error}); download it again"
            ) from None
        if index is not None:
            self._compare(path, set(names), {n for n, file in index.items() if file == path.name})
        for name in names:
            if name.startswith(self._prefix):
                bare = name.removeprefix(self._prefix)
                self._files[bare] = path
                self.shapes[bare], self.dtypes[bare] = shapes[name], dtypes[name]

    def _compare(self, path: Path, held: set[str], listed: set[str]) -> None:
        absent, unlisted = sorted(listed - held), sorted(held - listed)
        if absent:
            raise CheckpointError(
                f"{path} does not hold {_some(absent)}, as {INDEX_FILE} says; download both again"
            )
        if unlisted:
            raise CheckpointError(
                f"{self.folder / INDEX_FILE} does not list {_some(unlisted)} of {path.name}; "
                "download both again"
            )


def _some(names: list[str], shown: int = 3) -> str:
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
