"""Tensors that are computed again in the backward pass instead of being kept for it.

For what is cheap to repeat (norms, the FFN's activation) and deterministic. megatron-core's
`CheckpointWithoutOutput` restores random states, runs a second graph and needs Transformer Engine
under FP8; here the graph of the first pass is the only one.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def recompute_in_backward(tensor: Tensor, compute: Callable[[], Tensor], user: Tensor) -> None:
    """Free a tensor's memory until the gradient of what was made of it arrives.

    Call it when the forward pass does not read the tensor any more.

    Args:
        tensor: any shape and dtype; the whole of its storage. Views of it may have been saved for
            the backward pass.
        compute: gives the same values again, shaped like it; called without a graph.
        user: an output whose backward pass, or what runs behind it, is the first to read the
            tensor. Where it wants no gradient nothing was saved, and nothing happens.
    """
    if not user.requires_grad:
        return
    size = tensor.untyped_storage().nbytes()
    # A graph outlives its backward pass, and with it its hooks: what they need goes after use, as
    # autograd's saved tensors do.
    waiting = [(tensor, compute)]

    @torch.no_grad()
    def refill(_: Tensor) -> None:
        if not waiting:  # a second backward pass through a graph that is retained
            return
        tensor, compute = waiting.pop()
        tensor.untyped_storage().resize_(size)
        # Through `.data`, whose version autograd does not count: else this write would make it
        # refuse the tensor that it saved.
        tensor.data.copy_(compute())

    user.register_hook(refill)
    tensor.untyped_storage().resize_(0)
