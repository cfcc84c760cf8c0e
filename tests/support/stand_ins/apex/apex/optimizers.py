"""FusedAdam; in place of its kernel, the product's host Adam."""

from collections.abc import Iterable
from typing import Any

import torch

from megatron_dattn.runtime.host_adam import HostAdam


class FusedAdam(HostAdam):
    updates = 0

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        assert bias_correction
        assert not amsgrad
        assert not master_weights
        super().__init__(params, lr, betas, eps, weight_decay, adam_w_mode, capturable)

    def step(self, closure: Any = None) -> None:
        FusedAdam.updates += 1
        super().step(closure)


class FusedSGD(torch.optim.SGD):
    pass
