"""Bringing tensors made on the host to the device without waiting for it.

A copy from ordinary memory waits until the device has done all work before it. While the host
waits it launches nothing, and the device then idles until it does: a gap for every such copy.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes: every dtype may begin there


def to_device(host: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of any shape and dtype on the device; itself where it is there already."""
    if host.device.type == "cpu" and torch.device(device).type == "cuda":
        host = host.pin_memory()  # torch keeps this memory until the copy is done
    return host.to(device, non_blocking=True)


def all_to_device(host: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Tensors of any shapes and dtypes on the device, in one copy: each of its own costs the host
    more than the bytes cost the bus."""
    if torch.device(device).type == "cpu":
        return [to_device(tensor, device) for tensor in host]
    rounded = (-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in host)
    *starts, total = accumulate(rounded, initial=0)
    together = torch.empty(total, dtype=torch.uint8)
    for tensor, start in zip(host, starts, strict=True):
        _room(together, start, tensor).copy_(tensor)
    together = to_device(together, device)
    return [_room(together, start, tensor) for tensor, start in zip(host, starts, strict=True)]


def _room(buffer: Tensor, start: int, tensor: Tensor) -> Tensor:
    """That part of a buffer of bytes as a tensor like this one."""
    return buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
