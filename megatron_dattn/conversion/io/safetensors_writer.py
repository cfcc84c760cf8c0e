"""Writes safetensors in shards, holding one parameter at a time.

The parts are known by size before any exists, so shards can be planned and numbered, and their
headers written, first; then each part is made, written and dropped.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_dattn.checkpoint.files import PAGES_KEPT, forget_pages
from megatron_dattn.conversion.io.safetensors_reader import (
    DTYPE_NAMES,
    INDEX_FILE,
    LENGTH_BYTES,
    SINGLE_FILE,
)
from megatron_dattn.runtime.os_errors import named
from megatron_dattn.runtime.progress import Advance

_ALIGNMENT = 8


@dataclass(frozen=True)
class PlannedTensors:
    """Tensors that are made together, by name: the pieces of one parameter."""

    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    make: Callable[[], dict[str, Tensor]]

    @property
    def num_elements(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


def write_shards(
    folder: Path,
    planned: Sequence[PlannedTensors],
    max_shard_bytes: int,
    written: Advance = lambda num_bytes: None,
) -> None:
    """Write all tensors, synced: one file, or several and their index.

    A shard is larger than the limit only where the pieces of one parameter are.

    Args:
        written: is told the bytes of each parameter that has been converted.
    """
    shards = plan_shards(planned, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        name = SINGLE_FILE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard, written)
        weight_map |= {key: name for part in shard for key in part.shapes}
    if len(shards) > 1:
        _write_index(folder / INDEX_FILE, planned, weight_map)


def plan_shards(
    planned: Sequence[PlannedTensors], max_shard_bytes: int
) -> list[list[PlannedTensors]]:
    """Consecutive tensors, as many in a shard as fit."""
    shards: list[list[PlannedTensors]] = []
    room = 0
    for part in planned:
        if not shards or part.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(part)
        room -= part.num_bytes
    return shards


def _write_shard(path: Path, shard: list[PlannedTensors], written: Advance) -> None:
    # Wide types first: what is read in place must not begin between two values.
    parts = sorted(shard, key=lambda part: -part.dtype.itemsize)
    with named(path), open(path, "xb") as file:
        file.write(_header(parts))
        kept = 0
        for part in parts:
            tensors = part.make()
            for name, shape in part.shapes.items():
                _write_tensor(file, tensors[name], shape, part.dtype)
            written(part.num_bytes)
            kept += part.num_bytes
            if kept >= PAGES_KEPT:
                forget_pages(file.fileno())
                kept = 0
        file.flush()
        os.fsync(file.fileno())


def _header(parts: list[PlannedTensors]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        for name, shape in part.shapes.items():
            start, end = end, end + prod(shape) * part.dtype.itemsize
            dtype = DTYPE_NAMES[part.dtype]
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _write_tensor(
    file: BinaryIO, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    assert (tuple(value.shape), value.dtype) == (shape, dtype), (value.shape, value.dtype)
    file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)


def _write_index(path: Path, planned: Sequence[PlannedTensors], weight_map: dict[str, str]) -> None:
    index = {
        "metadata": {
            "total_size": sum(part.num_bytes for part in planned),
            "total_parameters": sum(part.num_elements for part in planned),
        },
        "weight_map": dict(sorted(weight_map.items())),
    }
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
