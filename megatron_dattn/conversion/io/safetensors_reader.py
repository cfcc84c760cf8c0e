"""Reads a Hugging Face checkpoint folder tensor by tensor, from safetensors only.

Pickled weights (.bin) are refused: loading them runs code. Nothing is read before it is asked
for, so a large checkpoint costs one tensor of memory at a time.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dattn.checkpoint.files import forget_pages
from megatron_dattn.conversion.io.hf_folder import read_json, some, what_it_holds
from megatron_dattn.errors import CheckpointError
from megatron_dattn.runtime.untrusted_file import show

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LENGTH_BYTES = 8
"""A file begins with the length of its JSON header, little endian; the values follow the header."""
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
"""Those that weights may have, in safetensors' words."""
_BLOCK_BYTES = 16 * 2**20
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class _Place:
    """Where the values of a tensor begin."""

    path: Path
    offset: int


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
        self._places: dict[str, _Place] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        """In safetensors' words: BF16, F32, ..."""
        self.num_bytes: dict[str, int] = {}
        index = self._index()
        for path in self._shards(index):
            self._scan(path, index)

    def load(self, name: str) -> Tensor:
        """Read a tensor, any shape and floating dtype, into new memory.

        Mapping the file instead would cost a page fault every 4 KiB, which is several times slower.

        Raises:
            CheckpointError: the file has changed since it was opened.
            OSError: it cannot be read.
        """
        place, shape, dtype = self._places[name], self.shapes[name], _DTYPES[self.dtypes[name]]
        raw = torch.empty(prod(shape) * dtype.itemsize, dtype=torch.uint8)
        with open(place.path, "rb") as file:
            file.seek(place.offset)
            if file.readinto(raw.numpy().data) != raw.numel():
                raise CheckpointError(f"{place.path} ends inside of {name}; download it again")
            forget_pages(file.fileno(), place.offset, raw.numel())
        return raw.view(dtype).reshape(shape)

    def dtype(self, name: str) -> torch.dtype:
        """Of a floating-point tensor."""
        return _DTYPES[self.dtypes[name]]

    def are_equal(self, first: str, second: str) -> bool:
        """True if two tensors have the same type, shape and bytes; read block by block.

        Raises:
            OSError: they cannot be read.
        """
        if (self.shapes[first], self.dtypes[first]) != (self.shapes[second], self.dtypes[second]):
            return False
        left = prod(self.shapes[first]) * _DTYPES[self.dtypes[first]].itemsize
        one, other = self._places[first], self._places[second]
        with open(one.path, "rb") as a, open(other.path, "rb") as b:
            a.seek(one.offset)
            b.seek(other.offset)
            while left:
                block = min(left, _BLOCK_BYTES)
                if a.read(block) != b.read(block):
                    return False
                left -= block
            for file in (a, b):
                forget_pages(file.fileno())
        return True

    def _index(self) -> dict[str, str] | None:
        """The file of every tensor as the folder's index has it; None without index."""
        path = self.folder / INDEX_FILE
        if not path.is_file():
            return None
        index = read_json(path).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{path} lists no weights")
        for name, file in index.items():
            if not _is_file_name(file):
                raise CheckpointError(
                    f"{path} has {name} in {show(file)}, which is no name of a file beside it"
                )
        single = self.folder / SINGLE_FILE
        # transformers would read the single file, whatever the index says.
        if single.is_file() and SINGLE_FILE not in index.values():
            raise CheckpointError(
                f"{single} and {path} are both there, and the index does not list that file: they "
                "are two models' weights; delete the one that is not meant"
            )
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
            raise self._no_weights()
        return paths

    def _no_weights(self) -> CheckpointError:
        """What the folder holds instead, and what to do about it."""
        found = sorted(path.name for path in self.folder.glob("model*.safetensors"))
        if found:
            reason = f"holds {some(found)}, but {INDEX_FILE} is missing; download it too"
            return CheckpointError(f"{self.folder} {reason}")
        nothing = f"{self.folder} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE}"
        return CheckpointError(what_it_holds(self.folder) or nothing)

    def _scan(self, path: Path, index: dict[str, str] | None) -> None:
        try:
            with safe_open(path, framework="pt"):
                pass  # it compares the header with the file's length
            header, start = _header(path)
        except (SafetensorError, OSError) as error:
            if _is_pointer(path):
                raise CheckpointError(
                    f"{path} is a Git LFS pointer, not the file: run git lfs pull in its folder"
                ) from None
            raise CheckpointError(
                f"{path} is damaged or truncated ({error}); download it again"
            ) from None
        if index is not None:
            self._compare(path, set(header), {n for n, file in index.items() if file == path.name})
        for name, entry in header.items():
            if name.startswith(self._prefix):
                bare = name.removeprefix(self._prefix)
                begin, end = entry["data_offsets"]
                self._places[bare], self.num_bytes[bare] = _Place(path, start + begin), end - begin
                self.shapes[bare], self.dtypes[bare] = tuple(entry["shape"]), entry["dtype"]

    def _compare(self, path: Path, held: set[str], listed: set[str]) -> None:
        absent, unlisted = sorted(listed - held), sorted(held - listed)
        if absent:
            raise CheckpointError(
                f"{path} does not hold {some(absent)}, as {INDEX_FILE} says; download both again"
            )
        if unlisted:
            raise CheckpointError(
                f"{self.folder / INDEX_FILE} does not list {some(unlisted)} of {path.name}; "
                "download both again"
            )


def _is_file_name(value: Any) -> bool:
    """Whether it names a file and not a path, which would lead out of the folder."""
    is_text = isinstance(value, str) and "\0" not in value
    return is_text and value not in ("", "..") and Path(value).name == value


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of a sound file by tensor, and where its values begin."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return entries, LENGTH_BYTES + length


def _is_pointer(path: Path) -> bool:
    """Whether it is what a clone without Git LFS has in the place of a large file."""
    start = b"version https://git-lfs"
    with open(path, "rb") as file:
        return file.read(len(start)) == start
