"""Single parameters out of checkpoints, without a model's worth of memory.

`open_tensors` finds them in a checkpoint of any parallel layout: a key's chunks are joined, a layer
is cut out of the tensor that stacks all layers. `parameter_shards` (share.py) is the other
direction. Neither needs megatron-core's model; that its names are those of here is tested with
every preset.
"""

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
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
from megatron_dattn.checkpoint.share import parameter_names
from megatron_dattn.errors import CheckpointError


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
        for name, layer in parameter_names(key, size):
            shape = size if layer is None else size[1:]
            tensors[name] = StoredTensor(name, shape, dtype, stored, key, layer, reader)
    return tensors
