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
        CheckpointError: no safetensors, a shard that is missing or damaged.
    """

    def __init__(self, folder: Path, *, prefix: str = "") -> None:
        self.folder = folder
        self._prefix = prefix
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in self._shards():
            self._scan(path)

    def load(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(self._prefix + name)

    def _shards(self) -> list[Path]:
        index = self.folder / INDEX_FILE
        if index.is_file():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            if not names:
                raise CheckpointError(f"{index} lists no weights")
            paths = [self.folder / name for name in names]
        else:
            paths = [self.folder / SINGLE_FILE]
        for path in paths:
            if not path.is_file():
                raise CheckpointError(
                    f"{path} is missing; weights are read from safetensors only "
                    "(convert .bin files with save_pretrained first)"
                )
        return paths

    def _scan(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                names = [n for n in file.keys() if n.startswith(self._prefix)]  # noqa: SIM118
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged or truncated ({error}); download it again"
            ) from None
        for name, shape in shapes.items():
            bare = name.removeprefix(self._prefix)
            self._files[bare] = path
            self.shapes[bare] = shape
