"""The distributed optimizer's state as parts of whole tensors, on the rank that holds them.

megatron-core's distributed optimizer cuts buckets of flattened parameters into equal ranges, one
per data-parallel rank, wherever a parameter begins or ends. Its own way to a checkpoint that loads
under any layout (`fully_reshardable`) gathers every buffer on one rank to make whole tensors of it.
But a range of a tensor in row-major order is a few boxes of it: the end of a row, whole rows, the
beginning of a row, and within such a row the same again. Each rank stores its ranges as such boxes
under the keys and shapes of the whole tensors. Nothing is gathered or copied, a checkpoint does not
tell how many ranks there were, and loading reads straight into the optimizer's own memory.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from torch import Tensor

PREFIX = "optimizer.state"
MASTER_WEIGHT = "fp32_param"
"""As the other optimizers of megatron-core call it in a checkpoint; inside of it, `param`."""

Shape = tuple[int, ...]


def boxes(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """Cut a range of a tensor's elements, in row-major order, into boxes.

    Args:
        start, stop: of the range, 0 <= start <= stop <= number of elements.

    Yields:
        Offsets and sizes of each, in the order of their elements: at most 2 n - 1 for n axes.
    """
    if start == stop:
        return
    if not shape:
        yield (), ()
        return
    row, inner = prod(shape[1:]), shape[1:]
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        for offsets, sizes in boxes(inner, head, tail):
            yield (first, *offsets), (1, *sizes)
        return
    if head:
        for offsets, sizes in boxes(inner, head, row):
            yield (first, *offsets), (1, *sizes)
        first += 1
    if first < last:
        yield (first, *(0 for _ in inner)), (last - first, *inner)
    for offsets, sizes in boxes(inner, 0, tail):
        yield (last, *offsets), (1, *sizes)


def sharded_flat_state(optimizer: Any, model_state: ShardedStateDict) -> ShardedStateDict:
    """Shards of Adam's moments, and of FP32 weights of BF16 parameters, that this rank holds.

    Their tensors are views of the optimizer's own.

    Args:
        optimizer: megatron-core's DistributedOptimizer, with a state for every parameter.
        model_state: of the model that it updates; factories not yet applied.
    """
    shards = {
        shard.data: shard
        for shard in nested_values(model_state)
        if isinstance(shard, ShardedTensor | ShardedTensorFactory)
    }
    state: dict[str, dict[str, ShardedTensor]] = {}
    for parameter, (start, stop) in _ranges(optimizer):
        parts = _parts(shards[parameter])
        for name, values in _values(optimizer, parameter).items():
            assert values.numel() == stop - start, (name, values.shape, start, stop)
            pieces = state.setdefault(name, {})
            for part in parts:
                for piece in _pieces(part, f"{PREFIX}.{name}", values.view(-1), start):
                    pieces[str(len(pieces))] = piece
    return state


def _ranges(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, tuple[int, int]]]:
    """The parameters of which this rank holds something, and which of their elements."""
    for by_dtype in optimizer.gbuf_ranges:
        for buckets in by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, (ranges["param"].start, ranges["param"].end)


def _values(optimizer: Any, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    """This rank's elements of the parameter's state, by name in a checkpoint; [elements], FP32."""
    assert not optimizer.config.use_precision_aware_optimizer, "its state is stored scaled"
    values = optimizer._get_main_param_and_optimizer_states(parameter)
    master = values.pop("param")
    if parameter.dtype != master.dtype:  # else it is the weight itself
        values[MASTER_WEIGHT] = master
    values.pop("step", None)  # of torch's own Adam; the groups have it
    return {name: value.detach() for name, value in values.items()}


@dataclass(frozen=True)
class _Part:
    """A stretch of a flattened parameter that is one shard of a tensor in the checkpoint."""

    shard: ShardedTensor
    start: int
    """Of its first element."""


def _parts(shard: ShardedTensor | ShardedTensorFactory) -> list[_Part]:
    if isinstance(shard, ShardedTensor):
        return [_Part(shard.without_data(), 0)]
    # What a factory makes of the parameter (gate and up projection of one matrix) it makes of a
    # tensor without memory too; the parts tell where they begin.
    whole = torch.empty(shard.data.shape, device="meta")
    built = list(nested_values(shard.build_fn(shard.key, whole, shard.replica_id, None)))
    assert all(part.data.is_contiguous() for part in built), f"{shard.key}: cut across rows"
    assert sum(part.data.numel() for part in built) == whole.numel(), shard.key
    return [_Part(part.without_data(), part.data.storage_offset()) for part in built]


def _pieces(part: _Part, prefix: str, values: Tensor, first: int) -> Iterator[ShardedTensor]:
    """The part's share of a range of elements.

    Args:
        values: of the range, [elements], any dtype.
        first: where the range begins in the parameter.
    """
    shard = part.shard
    end = part.start + prod(shard.local_shape)
    start, stop = max(first, part.start), min(first + values.numel(), end)
    if start >= stop:
        return
    # This rank's alone, but for replicas over tensor-parallel ranks and ends of a pipeline.
    replica = shard.replica_id
    is_main = is_main_replica((*replica[:-1], 0) if isinstance(replica, tuple) else replica)
    num_layer_axes = shard.prepend_axis_num
    layers, rest = shard.global_offset[:num_layer_axes], shard.global_offset[num_layer_axes:]
    position = start - first
    for offsets, sizes in boxes(shard.local_shape, start - part.start, stop - part.start):
        size = prod(sizes)
        shape = (*(1 for _ in layers), *sizes)
        yield ShardedTensor(
            key=f"{prefix}.{shard.key}",
            data=values[position : position + size].view(shape),
            dtype=values.dtype,
            local_shape=shape,
            global_shape=shard.global_shape,
            global_offset=(*layers, *(a + b for a, b in zip(rest, offsets, strict=True))),
            axis_fragmentations=None,  # of no regular grid
            replica_id=0 if is_main else 1,
            allow_shape_mismatch=shard.allow_shape_mismatch,
        )
        position += size


def older_names(request: ShardedStateDict, stored: Mapping[str, torch.dtype | None]) -> set[str]:
    """Look for FP32 weights under the name of a checkpoint whose optimizer's state was gathered.

    It stored the weights of FP32 models there as well, once more.

    Args:
        request: what is to be loaded; its keys are changed in place.
        stored: the dtypes of what the checkpoint holds, by key; None for what is no tensor.

    Returns:
        Keys of the checkpoint that need not be asked for: the same values stand elsewhere.
    """
    new, old = f"{PREFIX}.{MASTER_WEIGHT}.", f"{PREFIX}.param."
    for shard in nested_values(request):
        if isinstance(shard, ShardedTensor | ShardedTensorFactory) and shard.key not in stored:
            older = old + shard.key.removeprefix(new)
            if shard.key.startswith(new) and older in stored:
                shard.key = older
    return {
        key
        for key, dtype in stored.items()
        if key.startswith(old) and stored.get(key.removeprefix(old)) == dtype
    }
