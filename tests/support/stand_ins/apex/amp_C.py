"""Stands for apex's kernels over lists of tensors, with their arguments."""

import torch
from torch import Tensor


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, None]:
    sizes = torch.stack([tensor.float().norm() for tensor in tensor_lists[0]])
    return sizes.norm().reshape(1), None


def multi_tensor_scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float
) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)
