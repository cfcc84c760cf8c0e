"""What each rank writes of a sharded state dict, where it is in memory, and its copy.

No rank speaks to another here: what it writes follows from its sharded state dict, and replicas of
data parallelism deal out what they all hold by one rule. Tensors without memory (on the meta
device) may be given for a state that is larger than the machine: each one's values are asked for
when its turn comes to be written. `parameter_shards` makes such a state of whole parameters, as an
import has them.
"""

import copy
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.msc_utils import MultiStorageClientFeature
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_dattn.checkpoint.chunk_bytes import HostMemory
from megatron_dattn.runtime.engine_imports import TE_NORMS

# A tensor is stored as a small zip archive; this covers its headers and alignment.
_BYTES_PER_RECORD = 4096
# megatron-core stacks the layers along a new first axis; the key then has no layer number.
_STACKED = re.compile(r"(?<=\blayers\.)(?!\d)")
_LAYER = re.compile(r"(?<=\blayers\.)(\d+)\.")

Values = Callable[[str, tuple[int, ...]], Tensor]
"""The values of a tensor on the meta device, by its key and its offset in the global tensor."""


class Share(dcp.DefaultSavePlanner):
    """What this rank writes of a sharded state dict.

    Args:
        state: megatron-core's sharded state dict of this rank; factories in it are replaced by
            what they build.
        values: of the tensors on the meta device, if there are any; each is asked for once.
    """

    def __init__(self, state: ShardedStateDict, values: Values | None = None) -> None:
        super().__init__(flatten_state_dict=False)
        MultiStorageClientFeature.disable()  # it is on wherever its package is installed
        # That all of every tensor is written, and once, `write_index` looks after.
        sharded, self.common = save_preprocess(state, validate_access_integrity=False)
        self.is_copied = False
        self._values = values
        self._tensors: dict[MetadataIndex, Tensor] = {}
        self._objects: dict[MetadataIndex, io.BytesIO] = {}
        self._items = [self._add(shard) for shard in _own_shards(sharded)]

    def _add(self, shard: ShardedBase) -> WriteItem:
        if not isinstance(shard, ShardedTensor):
            assert isinstance(shard, ShardedObject)
            index, stream = MetadataIndex(shard.unique_key), io.BytesIO()
            torch.save([shard.data], stream)
            self._objects[index] = stream
            return WriteItem(index, WriteItemType.BYTE_IO)
        assert shard.data is not None, shard.key
        offsets = torch.Size(shard.global_offset)
        sizes = torch.Size((*(1,) * shard.prepend_axis_num, *shard.local_shape))
        index = MetadataIndex(shard.key, offsets)
        assert index not in self._tensors, f"{shard.key} is there twice at {tuple(offsets)}"
        self._tensors[index] = shard.data.detach()
        chunk = ChunkStorageMetadata(offsets, sizes)
        properties = TensorProperties(dtype=shard.data.dtype)
        data = TensorWriteData(chunk, properties, torch.Size(shard.global_shape))
        return WriteItem(index, WriteItemType.SHARD, tensor_data=data)

    @property
    def save_plan(self) -> SavePlan:
        """For torch's writer."""
        return SavePlan(self._items)

    @property
    def num_bytes(self) -> int:
        """Bytes that will be written, headers included; objects other than tensors are small."""
        tensors = sum(_num_bytes(tensor) for tensor in self._tensors.values())
        return tensors + _BYTES_PER_RECORD * len(self._items)

    def copy_to(self, memory: HostMemory) -> None:
        """Copy everything there: from now on the state itself may change."""
        places = memory.places(list(self._tensors.values()))
        for place, tensor in zip(places, self._tensors.values(), strict=True):
            place.copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._tensors = dict(zip(self._tensors, places, strict=True))
        self.common = copy.deepcopy(self.common)
        self.is_copied = True

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Values of a chunk: bytes, or a contiguous tensor of any shape and dtype."""
        index = write_item.index
        if write_item.type == WriteItemType.BYTE_IO:
            return self._objects[index]
        value = self._tensors[index]
        if value.is_meta:
            assert self._values is not None, f"{index.fqn} has no values"
            assert index.offset is not None
            dtype, value = value.dtype, self._values(index.fqn, tuple(index.offset))
            assert value.dtype == dtype, (index, value.dtype, dtype)
        assert write_item.tensor_data is not None
        return value.contiguous().view(write_item.tensor_data.chunk.sizes)


def _own_shards(sharded: ShardedStateDict) -> list[ShardedBase]:
    """The shards that this rank is to write.

    A replica id ends with the place among the data-parallel replicas, context-parallel ones
    included: they all hold the shard, and each writes about as many bytes. They need not speak of
    it, as they deal the same shards in the same order. Source: megatron-core's
    `distribute_shards_to_ranks`, exchange_utils.py, which gathers them first.
    """
    size, place = _replicas()
    own: list[ShardedBase] = []
    dealt: list[ShardedTensor] = []
    for shard in nested_values(sharded):
        replica = shard.replica_id
        if size > 1 and isinstance(shard, ShardedTensor) and isinstance(replica, tuple):
            if not any(replica[:-1]):
                dealt.append(shard)
        elif is_main_replica(replica):
            own.append(shard)
    loads = [0] * size
    for shard in sorted(dealt, key=lambda s: (-_num_bytes(s.data), s.key, s.global_offset)):
        receiver = loads.index(min(loads))
        loads[receiver] += _num_bytes(shard.data)
        if receiver == place:
            own.append(shard)
    return own


def _replicas() -> tuple[int, int]:
    """How many ranks hold the same weights as this one, and its place among them."""
    if not parallel_state.model_parallel_is_initialized():
        return 1, 0
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group.size(), group.rank()


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def parameter_shards(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, ShardedTensor]:
    """The sharded state dict of whole parameters, as one rank without parallelism has it.

    Under the same keys as the model's own, which need not be built for it; on the meta device.

    Args:
        shapes: by name, as `parameter_names` has them; of all layers or of none.
    """
    num_layers = Counter(_key_of(name) for name in shapes)
    shards: dict[str, ShardedTensor] = {}
    for name, shape in shapes.items():
        key, layer = _key_of(name), _LAYER.search(name)
        place = () if layer is None else ((0, int(layer[1]), num_layers[key]),)
        shards[name] = ShardedTensor.from_rank_offsets(
            key, torch.empty(shape, dtype=dtype, device="meta"), *place, prepend_axis_num=len(place)
        )
    return shards


def values_by_name(shards: Mapping[str, ShardedTensor], load: Callable[[str], Tensor]) -> Values:
    """The values of such shards for `save_checkpoint`; each is loaded when its turn comes.

    Args:
        load: a parameter by its name, on the CPU: any shape and dtype that its shard has.
    """
    names = {(shard.key, tuple(shard.global_offset)): name for name, shard in shards.items()}
    return lambda key, offset: load(names[key, offset])


def parameter_names(key: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int | None]]:
    """The parameters that are stored under a key.

    Args:
        shape: of the stored tensor, whose first axis may be one of layers.

    Yields:
        Name, as in `named_parameters()` of the model with local layers on one pipeline stage, and
        index along the axis of layers; None if there is no such axis.
    """
    name = key
    for fused, apart in TE_NORMS.items():
        name = name.replace(fused, apart)
    if not _STACKED.search(key):
        yield name, None
        return
    for layer in range(shape[0]):
        yield _STACKED.sub(f"{layer}.", name), layer


def _key_of(name: str) -> str:
    """Under which a parameter is stored: the inverse of `parameter_names`."""
    key = _LAYER.sub("", name)
    for fused, apart in TE_NORMS.items():
        key = key.replace(apart, fused)
    return key
