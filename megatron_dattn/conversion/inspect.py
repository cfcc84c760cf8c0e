"""What a folder of weights holds: names, types, shapes, and the size of every module.

Reads headers and indices only, of a Hugging Face folder (safetensors) or of a checkpoint of ours.
Modules and their parts are called alike for both, so that the two tables can be compared.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from megatron_dattn.checkpoint import find_checkpoint
from megatron_dattn.checkpoint.tensors import open_tensors
from megatron_dattn.conversion.io.safetensors_reader import (
    DTYPE_NAMES,
    INDEX_FILE,
    SafetensorsFolder,
)
from megatron_dattn.errors import CheckpointError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# Our modules, in order, and what Hugging Face calls them: inside a whole model, or by what their
# tensors begin with where a folder holds one alone.
_MODULES = {
    "vision_model": (
        *("vision_tower", "embeddings", "encoder"),
        *("pre_layrnorm", "post_layernorm", "head"),
    ),
    "adapter": ("multi_modal_projector",),
    "language_model": ("model", "lm_head"),
}
_WHOLE_NAMES = ("vision_tower", "multi_modal_projector", *_MODULES)
_PARTS = {
    "embeddings": (
        *("embedding", "embed_tokens"),
        *("patch_embedding", "position_embedding", "class_embedding"),
    ),
    "layers": (),
    "norms": ("norm", "pre_layernorm", "pre_layrnorm", "post_layernorm", "final_layernorm"),
    "head": ("lm_head", "output_layer"),
    "linear_1": ("linear_fc1",),
    "linear_2": ("linear_fc2",),
}
# Names between a module and its parts.
_BETWEEN = ("model", "vision_model", "encoder", "decoder")


@dataclass(frozen=True)
class Entry:
    """One tensor as it is stored."""

    name: str
    dtype: str
    """In safetensors' words: BF16, F32, ..."""
    shape: tuple[int, ...]
    num_bytes: int

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
        return [
            Entry(name, weights.dtypes[name], shape, weights.num_bytes[name])
            for name, shape in weights.shapes.items()
        ]
    found = find_checkpoint(folder, verify=False)
    if found is None:
        raise CheckpointError(
            f"{folder} holds neither safetensors nor a checkpoint of this program"
        )
    return [
        Entry(tensor.name, _dtype_name(tensor.dtype), tensor.shape, tensor.num_bytes)
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
    """Parameters and bytes of every module, then of its parts, and of all together."""
    modules: dict[str, dict[str, list[Entry]]] = {}
    for entry in entries:
        module, part = _place(entry.name)
        modules.setdefault(module, {}).setdefault(part, []).append(entry)
    rows: list[tuple[str, list[Entry]]] = []
    for module in _ordered(modules, _MODULES):
        parts = modules[module]
        rows.append((module, [entry for part in parts.values() for entry in part]))
        if len(parts) > 1:
            rows += [(f"  {part}", parts[part]) for part in _ordered(parts, _PARTS)]
    rows.append(("total", list(entries)))
    counts = [f"{sum(entry.numel for entry in held):,}" for _, held in rows]
    sizes = [f"{sum(entry.num_bytes for entry in held):,}" for _, held in rows]
    return _aligned(
        [
            (name, f"{count:>{len(counts[-1])}} parameters", f"{size:>{len(sizes[-1])}} bytes")
            for (name, _), count, size in zip(rows, counts, sizes, strict=True)
        ]
    )


def _place(name: str) -> tuple[str, str]:
    """The module that a tensor belongs to, and the part of it, under our names."""
    parts = name.split(".")
    if parts[0] == "model" and parts[1:2] and parts[1] in _WHOLE_NAMES:
        parts = parts[1:]
    module = _known(parts[0], _MODULES)
    inner = parts[1:] if parts[0] in _WHOLE_NAMES else parts
    while len(inner) > 1 and inner[0] in _BETWEEN:
        inner = inner[1:]
    return module, _known(inner[0], _PARTS)


def _known(name: str, table: Mapping[str, Sequence[str]]) -> str:
    """Under which name a table has it; its own where it has it not."""
    return next((known for known, others in table.items() if name in others), name)


def _ordered(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Those that are known first, in their order."""
    first, found = tuple(known), tuple(names)
    return [name for name in first if name in found] + [n for n in found if n not in first]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
