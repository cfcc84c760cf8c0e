"""Single parameters out of, and into, checkpoints, without a model's worth of memory.

`open_tensors` reads them from a checkpoint of any parallel layout: a key's chunks are joined, a
layer is cut out of the tensor that stacks all layers. `ParameterValues` is the other direction: it
cuts whole parameters, loaded one at a time, into the chunks that `save_checkpoint` asks for.
Neither needs megatron-core's model or process groups.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_dattn.checkpoint.chunk_bytes import empty_on_host, read_chunk_into
from megatron_dattn.checkpoint.manifest import read_manifest
from megatron_dattn.checkpoint.reader import check_trusted, read_index
from megatron_dattn.errors import CheckpointError

# megatron-core stacks the layers along a new first axis; the key then has no layer number.
_STACKED = re.compile(r"(?<=\blayers\.)(?!\d)")
# Keys name a norm as Transformer Engine does, which fuses it with the linear layer behind it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


@dataclass(frozen=True)
class StoredTensor:
    """One whole parameter of a checkpoint, not loaded yet."""

    name: str
    """As in `named_parameters()` of the model with local layers on one pipeline stage."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    _stored: TensorStorageMetadata
    _key: str
    _layer: int | None
    """Index along the stored tensor's first axis, where that is an axis of layers."""
    _reader: dcp.FileSystemReader

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def load(self) -> Tensor:
        """Read it into new host memory: any shape, of `dtype`.

        Only chunks that overlap with it are read.

        Raises:
            CheckpointError: a file is missing or damaged, or there are not all chunks.
        """
        layer = () if self._layer is None else (self._layer,)
        start = torch.Size([*layer, *(0 for _ in self.shape)])
        size = torch.Size([*(1 for _ in layer), *self.shape])
        value = empty_on_host(size, self.dtype)
        wanted = [ChunkStorageMetadata(offsets=start, sizes=size)]
        items = create_read_items_for_chunk_list(self._key, self._stored, wanted)
        if sum(prod(item.lengths) for item in items) != value.numel():
            raise CheckpointError(f"{self._reader.path} does not hold all of {self.name}")
        try:
            left = [item for item in items if not self._read_in_place(item, value)]
            self._reader.read_data(LoadPlan(left), _Into(value)).wait()
        except Exception as error:  # a damaged archive may raise anything
            raise CheckpointError(
                f"{self.name} cannot be read from {self._reader.path}: {error}"
            ) from error
        return value.reshape(self.shape)

    def _read_in_place(self, item: ReadItem, value: Tensor) -> bool:
        """Read a chunk that is wanted whole, and whose place has no gaps; whether it was one."""
        place = narrow_tensor_by_index(value, item.dest_offsets, item.lengths)
        index = item.storage_index.index
        assert index is not None, "reads are planned by index"
        if self._stored.chunks[index].sizes != item.lengths or not place.is_contiguous():
            return False
        chunk = self._reader.storage_data[item.storage_index]
        shard = Path(self._reader.path) / chunk.relative_path
        return read_chunk_into(place, shard, chunk.offset, chunk.length)


class _Into(dcp.DefaultLoadPlanner):
    """Hands out one tensor as the place for all that is read."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._target


def open_tensors(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """All parameters of a checkpoint, by name; their values stay on the disk.

    Args:
        path: a checkpoint folder, as `find_checkpoint` gives it. What is read later is not compared
            with the manifest's sums: that is `verify`'s business.

    Raises:
        CheckpointError: no checkpoint, a damaged index, or one that everybody may write.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    check_trusted(folder, manifest.files)
    metadata = read_index(folder, manifest)
    reader = dcp.FileSystemReader(folder)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    modules = tuple(f"{module}." for module in manifest.modules)
    tensors: dict[str, StoredTensor] = {}
    for key, stored in metadata.state_dict_metadata.items():
        if not key.startswith(modules) or not isinstance(stored, TensorStorageMetadata):
            continue  # the optimizer's state, or an object
        size, dtype = tuple(stored.size), stored.properties.dtype
        stacked, name = _STACKED.search(key), _name_of(key)
        for layer in range(size[0]) if stacked else (None,):
            own = name if layer is None else _STACKED.sub(f"{layer}.", name)
            shape = size if layer is None else size[1:]
            tensors[own] = StoredTensor(own, shape, dtype, stored, key, layer, reader)
    return tensors


def _name_of(key: str) -> str:
    for fused, apart in _FUSED_NORMS.items():
        key = key.replace(fused, apart)
    return key


class ParameterValues:
    """The values of chunks for `save_checkpoint`, cut out of whole parameters.

    The chunks of one parameter are asked for one after the other (gate and up projection of a gated
    MLP, say), so one parameter is held at a time and each is loaded once.

    Args:
        shards: the model's sharded state dict, flat, as one rank without parallelism has it.
        load: a parameter by its name, on the CPU, of the shard's dtype.
    """

    def __init__(
        self,
        shards: Mapping[str, ShardedTensor | ShardedTensorFactory],
        load: Callable[[str], Tensor],
    ) -> None:
        self._load = load
        self._places: dict[tuple[str, tuple[int, ...]], tuple[str, tuple[slice, ...]]] = {}
        self._held: tuple[str, Tensor] | None = None
        for name, shard in shards.items():
            chunks = shard.build() if isinstance(shard, ShardedTensorFactory) else [shard]
            starts = [_start(chunk) for chunk in chunks]
            origin = [min(axis) for axis in zip(*starts, strict=True)]
            for chunk, start in zip(chunks, starts, strict=True):
                place = tuple(
                    slice(first - least, first - least + length)
                    for first, least, length in zip(start, origin, chunk.local_shape, strict=True)
                )
                self._places[chunk.key, tuple(chunk.global_offset)] = name, place

    def __call__(self, key: str, offset: tuple[int, ...]) -> Tensor:
        name, place = self._places[key, offset]
        if self._held is None or self._held[0] != name:
            self._held = None  # make room first
            self._held = name, self._load(name)
        return self._held[1][place]


def _start(chunk: ShardedTensor) -> tuple[int, ...]:
    """Where a chunk begins in its parameter's own axes."""
    return tuple(chunk.global_offset[chunk.prepend_axis_num :])
