"""Adam for host tensors with the contract of apex's and Transformer Engine's FusedAdam.

The step count lives in the parameter group, not beside every parameter: megatron-core's distributed
optimizer saves and restores it from there. The update itself is torch's own fused host kernel, one
pass over parameter, gradient and both moments, bitwise equal to torch.optim.AdamW(fused=True).
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch


class HostAdam(torch.optim.Optimizer):
    """Adam (`adam_w_mode=False`, L2 penalty) or AdamW (`adam_w_mode=True`, decoupled decay).

    Group keys: lr, betas, eps, weight_decay and, from the first step on, `step` (int, updates
    made). State of a parameter: `exp_avg` and `exp_avg_sq`, of its shape and type.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        # Newer megatron-core always says whether the update goes into a CUDA graph.
        assert not capturable, "there are no CUDA graphs on the host"
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self._update = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Raises:
            ValueError: for a closure; megatron-core computes the gradients itself.
        """
        if closure is not None:
            raise ValueError("HostAdam takes no closure: compute the gradients before step()")
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            # The fused kernel wants tensors of one type, as a model with FP32 norms has two.
            by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None and param.numel() > 0:
                    by_dtype.setdefault(param.dtype, []).append(param)
            for params in by_dtype.values():
                self._update_together(params, group)

    def _update_together(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        for param in params:
            state = self.state[param]
            if not state:
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
        beta1, beta2 = group["betas"]
        step = torch.tensor(float(group["step"]))
        self._update(
            params,
            [cast(torch.Tensor, param.grad) for param in params],
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            [],  # amsgrad is off
            [step] * len(params),  # only read by the kernel
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
