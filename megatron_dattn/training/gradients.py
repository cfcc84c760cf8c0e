"""What happens to a step's gradients between the backward pass and the update.

They are reduced, divided by the labelled tokens of the global batch, measured and clipped. All of
it is left on the device: the host reads the norm together with the step's other sums
(`losses.sum_over_world`), so it waits once. megatron-core's own functions wait once per question
(is there a token, is anything infinite, what is the norm), and without Transformer Engine or apex
once per tensor (utils.py:1205 of 0.16.1).
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from megatron_dattn.runtime.distributed import get_device


def finalize_gradients(
    model: list[DistributedDataParallel], num_tokens: Tensor | None = None, **options: Any
) -> None:
    """Reduce the gradients over ranks and divide them by the labelled tokens of all replicas.

    megatron-core's schedules call it after the last micro-batch, as its `finalize_model_grads`,
    whose division asks the host whether there is a token. Without one all gradients are zero.

    Args:
        model: the wrapped stage.
        num_tokens: of this replica, int32 [], right on the last stage; overwritten.
        options: handed on.
    """
    finalize_model_grads(model, None, **options)
    if num_tokens is None:
        return
    dist.broadcast(
        num_tokens,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    dist.all_reduce(num_tokens, group=parallel_state.get_data_parallel_group())
    for chunk in model:
        chunk.scale_gradients(1.0 / num_tokens.clamp(min=1))


@torch.no_grad()
def measure_gradients(optimizer: MegatronOptimizer) -> Tensor:
    """Hand the reduced gradients to the optimizer; the square of their global norm.

    Collective over the ranks that hold the model, or, with the distributed optimizer, over the
    world. Every parameter counts on one of them, so what is not finite anywhere shows.

    Returns:
        float32 [], on the device.
    """
    (part,) = optimizer.chained_optimizers  # several only for experts
    part.prepare_grads()
    gradients = _gradients_for_norm(part)
    norm = get_total_norm(gradients) if gradients else torch.zeros((), device=get_device())
    squared = norm.square()
    dist.all_reduce(squared, group=part.get_grad_stats_parallel_group())
    return squared


def update_weights(optimizer: MegatronOptimizer, grad_norm: float, clip_grad: float) -> None:
    """Clip by the global norm (0.0 does not clip) and update, after `measure_gradients`.

    `optimizer.step()` would do both without a chance to ask the other ranks in between.
    """
    # Clipping reads and writes every gradient, also where it multiplies by one.
    if 0 < clip_grad < grad_norm + 1e-6:
        norm = torch.full((), grad_norm, device=get_device())
        (part,) = optimizer.chained_optimizers
        clip_grads_with_norm_(part.get_parameters(), clip_grad, norm)
    optimizer.step_with_ready_grads()


def _gradients_for_norm(optimizer: MegatronOptimizer) -> list[Tensor]:
    """Those whose norm this rank adds to the global one: what several ranks hold (tied embedding,
    norms) counts on one of them. The method's name depends on megatron-core's release."""
    if hasattr(optimizer, "get_grads_for_grad_norm"):  # 0.19
        return optimizer.get_grads_for_grad_norm()
    return optimizer.get_main_grads_for_grad_norm()
