"""What a folder of weights holds: names, types, shapes and parameters per module.

Reads headers and indices only, of a Hugging Face folder (safetensors) or of a checkpoint of ours.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from megatron_dattn.checkpoint import find_checkpoint
from megatron_dattn.checkpoint.tensors import open_tensors
from megatron_dattn.conversion.safetensors_reader import (
    DTYPE_NAMES,
    INDEX_FILE,
    SafetensorsFolder,
)
from megatron_dattn.errors import CheckpointError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_OUTER_NAMES = ("model", "vision_model")


@dataclass(frozen=True)
class Entry:
    """One tensor as it is stored."""

    name: str
    dtype: str
    """In safetensors' words: BF16, F32, ..."""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)


def list_tensors(folder: Path) -> list[Entry]:
    """The tensors of a Hugging Face folder, a run folder's newest checkpoint, or one checkpoint.

    Raises:
        CheckpointError: it is none of them, or is damaged.
    """
    if (folder / INDEX_FILE).is_file() or any(folder.glob("*.safetensors")):
        weights = SafetensorsFolder(folder)
        return [Entry(name, weights.dtypes[name], shape) for name, shape in weights.shapes.items()]
    found = find_checkpoint(folder, verify=False)
    if found is None:
        raise CheckpointError(
            f"{folder} holds neither safetensors nor a checkpoint of this program"
        )
    return [
        Entry(tensor.name, _dtype_name(tensor.dtype), tensor.shape)
        for tensor in open_tensors(found.path).values()
    ]


def _dtype_name(dtype: torch.dtype) -> str:
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def tensor_table(entries: Iterable[Entry], *, every: bool = False) -> str:
    """One line per tensor; equal tensors of several layers share one line.

    Args:
        every: a line for each layer's tensors instead.
    """
    counts: dict[tuple[str, str, str], int] = {}
    for entry in entries:
        name = entry.name if every else _NUMBER.sub("*", entry.name)
        line = (name, entry.dtype, str(list(entry.shape)))
        counts[line] = counts.get(line, 0) + 1
    rows = [(*line, f"x {count}" if count > 1 else "") for line, count in counts.items()]
    return _aligned(rows)


def module_table(entries: Sequence[Entry]) -> str:
    """Parameters and bytes of every module, and of all together."""
    parameters: dict[str, int] = {}
    for entry in entries:
        module = _module(entry.name)
        parameters[module] = parameters.get(module, 0) + entry.numel
    parameters["total"] = sum(parameters.values())
    return _aligned([(module, f"{count:,} parameters") for module, count in parameters.items()])


def _module(name: str) -> str:
    """The first part of a name that tells modules apart: `model.layers` is none."""
    parts = name.split(".")
    outer = len(parts) > 2 and parts[0] in _OUTER_NAMES and not parts[1].isdecimal()
    return ".".join(parts[: 2 if outer else 1])


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
