"""Handing one rank's batches to its whole tensor-parallel group.

The group's first rank runs the data loader; the others receive each pack as three broadcasts: a
header with the sizes, the integers (layout, token ids, labels), the pixels. Only the pixels go from
device to device: what the host plans by is exchanged on the host, which else had to wait until the
device has it. A loader that fails is no matter of this file: the ranks agree on that before the
step (training/stream.py), when its packs are there.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.batch import PackedBatch
from megatron_dattn.runtime.distributed import host_group

_HEADER_FIELDS = 4


def broadcast_batch(
    batch: PackedBatch | None,
    device: torch.device | str,
    *,
    group: dist.ProcessGroup | None = None,
    pixels: bool | None = None,
) -> PackedBatch:
    """Send a batch from the first rank of a tensor-parallel group to the others.

    Args:
        batch: on the first rank, in host memory; ignored on the others.
        device: where the tensors shall be; the group's backend must know it.
        group: this rank's tensor-parallel group where None.
        pixels: whether to keep the pixels; where None, the first pipeline stage alone keeps them.

    Returns:
        The batch, on `device`. Only the first rank has the sample keys.
    """
    group = group if group is not None else parallel_state.get_tensor_model_parallel_group()
    if pixels is None:
        pixels = parallel_state.is_pipeline_first_stage()
    device = torch.device(device)
    if dist.get_rank(group) != 0:
        return _receive(group, device)
    assert batch is not None, "the first rank loads"
    return _send(batch if pixels else batch.without_pixels(), group, device)


def _send(batch: PackedBatch, group: dist.ProcessGroup, device: torch.device) -> PackedBatch:
    if dist.get_world_size(group) == 1:
        return batch.to(device)
    # Collectives need equal shapes on every rank, and packs differ: so sizes go first.
    layout = batch.layout.encode()
    num_images, _, image_size, _ = batch.pixel_values.shape
    sizes = (len(layout), batch.layout.text_budget, num_images, image_size)
    _broadcast(torch.tensor(sizes), host_group(group))
    _broadcast(torch.cat([layout, batch.input_ids, batch.labels]), host_group(group))
    batch = batch.to(device)
    _broadcast(batch.pixel_values, group)
    return batch


def _receive(group: dist.ProcessGroup, device: torch.device) -> PackedBatch:
    header = _broadcast(torch.empty(_HEADER_FIELDS, dtype=torch.int64), host_group(group))
    layout_length, text_budget, num_images, image_size = header.tolist()
    num_integers = layout_length + 2 * text_budget
    integers = _broadcast(torch.empty(num_integers, dtype=torch.int64), host_group(group))
    layout, input_ids, labels = integers.split([layout_length, text_budget, text_budget])
    pixel_values = torch.empty((num_images, 3, image_size, image_size), device=device)
    return PackedBatch(
        layout=TokenLayout.decode(layout),
        input_ids=input_ids,
        labels=labels,
        pixel_values=_broadcast(pixel_values, group),
        sample_keys=[],
    ).to(device)


def _broadcast(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Broadcast from the group's first rank, in place."""
    # The header told every rank that a tensor is empty, so all of them leave the broadcast out.
    if tensor.numel():
        dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)
    return tensor
