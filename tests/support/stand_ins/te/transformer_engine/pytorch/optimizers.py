"""FusedAdam and the multi-tensor kernels; in place of the kernels, the product's host Adam."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from megatron_dattn.runtime.host_adam import HostAdam


class FusedAdam(HostAdam):
    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        assert bias_correction
        assert not amsgrad
        assert not master_weights
        super().__init__(params, lr, betas, eps, weight_decay, adam_w_mode, capturable)


class FusedSGD(torch.optim.SGD):
    pass


def multi_tensor_applier(
    op: Callable[..., Any], noop_flag_buffer: Tensor, tensor_lists: list[list[Tensor]], *args: Any
) -> Any:
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, None]:
    norms = torch.stack([tensor.float().norm() for tensor in tensor_lists[0]])
    return norms.norm().reshape(1), None


def multi_tensor_scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float
) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)
