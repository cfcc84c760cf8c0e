"""What is called otherwise in one of megatron-core's admitted releases than in another.

Asked by what a release has, not by its number; everything else of ours works with all of them.
"""

from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor


def gradients_for_norm(optimizer: MegatronOptimizer) -> list[Tensor]:
    """Gradients, of any shapes, whose norm this rank adds to the global one.

    A parameter that several ranks hold (tied embedding, norms) counts on one of them.

    Args:
        optimizer: a single one, not a chain.
    """
    if hasattr(optimizer, "get_grads_for_grad_norm"):  # 0.19
        return optimizer.get_grads_for_grad_norm()
    return optimizer.get_main_grads_for_grad_norm()
