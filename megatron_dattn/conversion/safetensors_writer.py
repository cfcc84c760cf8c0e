"""Writes safetensors in shards, holding one shard at a time.

The parts are known by size before any exists, so shards can be planned and numbered first; then
each part is made, written with its shard, and dropped.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_dattn.conversion.safetensors_reader import INDEX_FILE, SINGLE_FILE


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


def write_shards(folder: Path, planned: Sequence[PlannedTensors], max_shard_bytes: int) -> None:
    """Write all tensors: one file, or several and their index.

    A shard is larger than the limit only where the pieces of one parameter are.
    """
    shards = plan_shards(planned, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        name = SINGLE_FILE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: value for part in shard for key, value in part.make().items()}
        save_file(
            {key: value.contiguous() for key, value in tensors.items()},
            folder / name,
            metadata={"format": "pt"},
        )
        (folder / name).chmod(0o644)  # safetensors lets the owner alone read it
        weight_map |= dict.fromkeys(tensors, name)
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


def _write_index(path: Path, planned: Sequence[PlannedTensors], weight_map: dict[str, str]) -> None:
    index = {
        "metadata": {
            "total_size": sum(part.num_bytes for part in planned),
            "total_parameters": sum(part.num_elements for part in planned),
        },
        "weight_map": dict(sorted(weight_map.items())),
    }
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
