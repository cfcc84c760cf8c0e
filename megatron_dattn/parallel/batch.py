"""Handing one rank's batches to its whole tensor-parallel group.

The group's first rank runs the data loader; the others receive each pack as three broadcasts: a
header with the sizes, the integers (layout, token ids, labels), the pixels. The header can also say
that there is no batch and why, so that no rank waits for a pack that will never come. Works on CPU
tensors with gloo and on CUDA tensors with NCCL.
"""

from enum import IntEnum

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.batch import PackedBatch
from megatron_dattn.errors import DataError

_HEADER_FIELDS = 5


class _Status(IntEnum):
    BATCH = 0
    FAILURE = 1


def broadcast_batch(
    batch: PackedBatch | Exception | None,
    device: torch.device | str,
    *,
    group: dist.ProcessGroup | None = None,
    pixels: bool | None = None,
) -> PackedBatch:
    """Send a batch from the first rank of a tensor-parallel group to the others.

    Args:
        batch: on the first rank the batch, None if the data has ended, or the error that came
            instead; ignored on the others.
        device: where the tensors shall be; must suit the group's backend.
        group: this rank's tensor-parallel group where None.
        pixels: whether to keep the pixels; where None, the first pipeline stage alone keeps them.

    Returns:
        The batch, on `device`. Only the first rank has the sample keys.

    Raises:
        DataError: on every rank, if the first rank had an error instead of a batch; there, the
            error itself is raised.
    """
    group = group if group is not None else parallel_state.get_tensor_model_parallel_group()
    if pixels is None:
        pixels = parallel_state.is_pipeline_first_stage()
    device = torch.device(device)
    if dist.get_rank(group) != 0:
        return _receive(group, device)
    if batch is None:
        batch = DataError("the data has ended")
    if isinstance(batch, Exception):
        # Sent before it is raised: the others wait for a header, and would until the timeout.
        _send_failure(batch, group, device)
        raise batch
    return _send(batch if pixels else batch.without_pixels(), group, device)


def _send(batch: PackedBatch, group: dist.ProcessGroup, device: torch.device) -> PackedBatch:
    if dist.get_world_size(group) == 1:
        return batch.to(device)
    # Collectives need equal shapes on every rank, and packs differ: so sizes go first.
    layout = batch.layout.encode()
    num_images, _, image_size, _ = batch.pixel_values.shape
    sizes = (len(layout), batch.layout.text_budget, num_images, image_size)
    _broadcast(_header(_Status.BATCH, *sizes), group, device)
    batch = batch.to(device)
    _broadcast(torch.cat([layout.to(device), batch.input_ids, batch.labels]), group, device)
    _broadcast(batch.pixel_values, group, device)
    return batch


def _receive(group: dist.ProcessGroup, device: torch.device) -> PackedBatch:
    status, *sizes = _broadcast(_header(_Status.BATCH), group, device).tolist()
    if status == _Status.FAILURE:
        message = _broadcast(torch.empty(sizes[0], dtype=torch.int64), group, device)
        raise DataError(bytes(message.tolist()).decode(errors="replace"))
    layout_length, text_budget, num_images, image_size = sizes
    num_integers = layout_length + 2 * text_budget
    integers = _broadcast(torch.empty(num_integers, dtype=torch.int64), group, device)
    layout, input_ids, labels = integers.split([layout_length, text_budget, text_budget])
    pixel_values = torch.empty((num_images, 3, image_size, image_size), device=device)
    return PackedBatch(
        # Planning reads the layout's numbers one by one, on the host: this waits for the device
        # once, instead of at each of them.
        layout=TokenLayout.decode(layout.cpu()),
        input_ids=input_ids,
        labels=labels,
        pixel_values=_broadcast(pixel_values, group, device),
        sample_keys=[],
    )


def _send_failure(error: Exception, group: dist.ProcessGroup, device: torch.device) -> None:
    message = torch.tensor(list(f"the data loader failed: {error}".encode()), dtype=torch.int64)
    _broadcast(_header(_Status.FAILURE, len(message)), group, device)
    _broadcast(message, group, device)


def _header(status: _Status, *sizes: int) -> Tensor:
    padded = (*sizes, *(0,) * (_HEADER_FIELDS - 1 - len(sizes)))
    return torch.tensor([status, *padded], dtype=torch.int64)


def _broadcast(tensor: Tensor, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """Broadcast from the group's first rank; the result lies on `device`."""
    tensor = tensor.to(device)
    # The header told every rank that a tensor is empty, so all of them leave the broadcast out.
    if dist.get_world_size(group) > 1 and tensor.numel():
        dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)
    return tensor
