"""Handing one rank's packs to all ranks that work on them.

One rank of a data-parallel replica runs the data loader: tensor- and context-parallel rank 0 of the
first pipeline stage. Every stage plans its attention by the layout, so all packs of a step go to
the whole replica before the step begins, without their pixels: text of a few kB each. Not when a
stage takes them: stages wait for each other's activations in the order of the schedule, and a
broadcast that waits for other stages would deadlock with it. Pixels follow pack by pack, among the
first stage's ranks, as the bytes that were loaded, from device to device. What the host plans by is
exchanged on the host, which else had to wait until the device has it. A loader that fails is no
matter of this file: the ranks agree on that before (training/stream.py).
"""

import io
import pickle
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_dattn.batch import PackedBatch
from megatron_dattn.parallel.context.shares import take_share
from megatron_dattn.runtime.distributed import host_group


def is_loading_rank() -> bool:
    """True if this rank is the one of its data-parallel replica that runs the data loader."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
        and parallel_state.is_pipeline_first_stage()
    )


def share_packs(
    packs: Sequence[PackedBatch], *, group: dist.ProcessGroup | None = None
) -> list[PackedBatch]:
    """Send packs from the first rank of a group to the others, without the pixels. Collective.

    Args:
        packs: on the first rank, in host memory; ignored on the others.
        group: all ranks that work on these packs; where None, first the context-parallel group and
            then each of its ranks' model-parallel group.

    Returns:
        The packs. On the other ranks their pixels are on the device "meta": shape and dtype alone.
    """
    if group is None:
        packs = share_packs(packs, group=parallel_state.get_context_parallel_group())
        group = parallel_state.get_model_parallel_group()
    if dist.get_world_size(group) == 1:
        return list(packs)
    is_first = dist.get_rank(group) == 0
    group = host_group(group)
    content = bytearray(_pickled(packs) if is_first else b"")
    size = _broadcast(torch.tensor(len(content)), group)
    if not is_first:
        content = bytearray(int(size))
    _broadcast(torch.frombuffer(content, dtype=torch.uint8), group)
    return list(packs) if is_first else pickle.loads(content)


def pack_on_device(
    pack: PackedBatch,
    device: torch.device | str,
    *,
    group: dist.ProcessGroup | None = None,
    pixels: bool | None = None,
) -> PackedBatch:
    """Bring a pack that `share_packs` gave to the device, with its pixels where they are read.

    Collective over the group where there are pixels.

    Args:
        device: where the tensors shall be; the group's backend must know it.
        group: whose first rank has the pixels; where None, this rank's tensor-parallel group, or,
            where there is context parallelism, its tensor- and context-parallel group, of which
            each rank then keeps its own images.
        pixels: whether this rank reads them; where None, the first pipeline stage alone does.

    Returns:
        The pack, on `device`, with float32 pixels, of which there are none where nobody reads them.
    """
    if pixels is None:
        pixels = parallel_state.is_pipeline_first_stage()
    share = None
    if group is None:
        group, share = _group_and_share()
    if pixels:
        pack = _with_pixels(pack, torch.device(device), group)
    else:
        pack = pack.without_pixels().to(device)
    return (take_share(pack, *share) if share else pack).normalised()


def _with_pixels(pack: PackedBatch, device: torch.device, group: dist.ProcessGroup) -> PackedBatch:
    if dist.get_rank(group) != 0:
        room = torch.empty_like(pack.pixel_values, device=device)
        pack = replace(pack, pixel_values=room)
    pack = pack.to(device)
    # The layout told every rank that there is no image, so all of them leave the broadcast out.
    if dist.get_world_size(group) > 1 and pack.pixel_values.numel():
        _broadcast(pack.pixel_values, group)
    return pack


def _group_and_share() -> tuple[dist.ProcessGroup, tuple[int, int] | None]:
    """The ranks that compute one pack's layers, and which of how many shares of its images is this
    rank's; None if it has them all."""
    ranks = parallel_state.get_context_parallel_world_size()
    if ranks == 1:
        return parallel_state.get_tensor_model_parallel_group(), None
    share = parallel_state.get_context_parallel_rank(), ranks
    return parallel_state.get_tensor_and_context_parallel_group(), share


def _pickled(packs: Sequence[PackedBatch]) -> bytes:
    """The packs with the shapes of their pixels in the place of these."""
    content = io.BytesIO()
    pickler = pickle.Pickler(content)
    pickler.dispatch_table = {Tensor: _made_of}
    pickler.dump([replace(pack, pixel_values=pack.pixel_values.to("meta")) for pack in packs])
    return content.getvalue()


def _made_of(tensor: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """What a tensor is unpickled from. torch would write an archive with all of its storage."""
    if tensor.is_meta:
        shape = tuple(tensor.shape)
        return partial(torch.empty, shape, dtype=tensor.dtype, device="meta"), ()
    return torch.from_numpy, (tensor.numpy(),)


def _broadcast(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Broadcast from the group's first rank, in place."""
    dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)
    return tensor
