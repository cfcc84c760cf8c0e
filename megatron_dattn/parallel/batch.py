"""Handing one rank's batches to its whole tensor- and context-parallel group.

The group's first rank runs the data loader; the others receive each pack as three broadcasts: a
header with the sizes, the integers (layout, token ids, labels), the pixels. Only the pixels go from
device to device, as the bytes that were loaded: what the host plans by is exchanged on the host,
which else had to wait until the device has it. A loader that fails is no matter of this file: the
ranks agree on that before the step (training/stream.py), when its packs are there.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.batch import PackedBatch
from megatron_dattn.parallel.context.shares import take_share
from megatron_dattn.runtime.distributed import host_group

_HEADER_FIELDS = 5


def broadcast_batch(
    batch: PackedBatch | None,
    device: torch.device | str,
    *,
    group: dist.ProcessGroup | None = None,
    pixels: bool | None = None,
) -> PackedBatch:
    """Send a batch from the first rank of a group to the others.

    Args:
        batch: on the first rank, in host memory; ignored on the others.
        device: where the tensors shall be; the group's backend must know it.
        group: this rank's tensor-parallel group where None, or, where there is context parallelism,
            the ranks that share its tensor- and context-parallel group; each then keeps its own
            images.
        pixels: whether to keep the pixels; where None, the first pipeline stage alone keeps them.

    Returns:
        The batch, on `device`, with float32 pixels. Only the first rank has the sample keys.
    """
    share = None
    if group is None:
        group, share = _group_and_share()
    if pixels is None:
        pixels = parallel_state.is_pipeline_first_stage()
    device = torch.device(device)
    if dist.get_rank(group) != 0:
        received = _receive(group, device)
    else:
        assert batch is not None, "the first rank loads"
        received = _send(batch if pixels else batch.without_pixels(), group, device)
    return (take_share(received, *share) if share else received).normalised()


def _group_and_share() -> tuple[dist.ProcessGroup, tuple[int, int] | None]:
    """The ranks that compute one pack's layers, and which of how many shares of its images is this
    rank's; None if it has them all."""
    ranks = parallel_state.get_context_parallel_world_size()
    if ranks == 1:
        return parallel_state.get_tensor_model_parallel_group(), None
    share = parallel_state.get_context_parallel_rank(), ranks
    return parallel_state.get_tensor_and_context_parallel_group(), share


def _send(batch: PackedBatch, group: dist.ProcessGroup, device: torch.device) -> PackedBatch:
    if dist.get_world_size(group) == 1:
        return batch.to(device)
    # Collectives need equal shapes on every rank, and packs differ: so sizes go first.
    layout = batch.layout.encode()
    num_images, _, image_size, _ = batch.pixel_values.shape
    scale = _as_integers(batch.pixel_scale)
    sizes = (len(layout), batch.layout.text_budget, num_images, image_size, len(scale))
    _broadcast(torch.tensor(sizes), host_group(group))
    _broadcast(torch.cat([layout, batch.input_ids, batch.labels, scale]), host_group(group))
    batch = batch.to(device)
    _broadcast(batch.pixel_values, group)
    return batch


def _receive(group: dist.ProcessGroup, device: torch.device) -> PackedBatch:
    header = _broadcast(torch.empty(_HEADER_FIELDS, dtype=torch.int64), host_group(group))
    layout_length, text_budget, num_images, image_size, scale_length = header.tolist()
    lengths = [layout_length, text_budget, text_budget, scale_length]
    integers = _broadcast(torch.empty(sum(lengths), dtype=torch.int64), host_group(group))
    layout, input_ids, labels, scale = integers.split(lengths)
    shape = (num_images, 3, image_size, image_size)
    dtype = torch.uint8 if scale_length else torch.float32
    pixel_values = torch.empty(shape, dtype=dtype, device=device)
    return PackedBatch(
        layout=TokenLayout.decode(layout),
        input_ids=input_ids,
        labels=labels,
        pixel_values=_broadcast(pixel_values, group),
        pixel_scale=_from_integers(scale) if scale_length else None,
        sample_keys=[],
    ).to(device)


def _as_integers(scale: Tensor | None) -> Tensor:
    """The bits of float32 values as int64, one each; none of None."""
    scale = torch.empty(0) if scale is None else scale
    return scale.flatten().view(torch.int32).long()


def _from_integers(bits: Tensor) -> Tensor:
    return bits.int().view(torch.float32).view(2, -1)


def _broadcast(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Broadcast from the group's first rank, in place."""
    # The header told every rank that a tensor is empty, so all of them leave the broadcast out.
    if tensor.numel():
        dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)
    return tensor
