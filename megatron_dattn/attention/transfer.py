"""Bringing tensors made on the host to the device without waiting for it.

A copy from ordinary memory waits until the device has done all work before it. While the host
waits it launches nothing, and the device then idles until it does: a gap for every such copy.
"""

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of any shape and dtype on the device; itself where it is there already."""
    if host.device.type == "cpu" and torch.device(device).type == "cuda":
        host = host.pin_memory()  # torch keeps this memory until the copy is done
    return host.to(device, non_blocking=True)
