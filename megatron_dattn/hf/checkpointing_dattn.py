"""Gradient checkpointing of the parts of a layer: keep what enters, compute the rest once more.

transformers sets `gradient_checkpointing` and `_gradient_checkpointing_func` on every module that
has the first. Its own base class for such layers checkpoints one `forward` of one tensor; ours pass
two kinds of tokens, and what text reads of images is two more tensors, so the call is made here.

This file travels with the exported weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def is_checkpointing(layer: nn.Module) -> bool:
    """True if a layer's next forward pass keeps its inputs only."""
    wanted = bool(getattr(layer, "gradient_checkpointing", False))
    return wanted and layer.training and torch.is_grad_enabled()


def checkpointed(layer: nn.Module, function: Callable[..., Any], *tensors: Tensor) -> Any:
    """`function(*tensors)`, a part of a layer, checkpointed where the model was told to.

    Args:
        tensors: any shape and dtype; all that a gradient may flow to but parameters. The reentrant
            kind finds none in nested arguments or in what `function` closes over.
    """
    if not is_checkpointing(layer):
        return function(*tensors)
    checkpoint: Any = layer._gradient_checkpointing_func  # which transformers has set
    return checkpoint(function, *with_gradient(layer, *tensors))


def with_gradient(layer: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, any shape and dtype; one requires a gradient if the layer has what is trained.

    Reentrant checkpointing gives the parameters of a layer no gradient, without a word, where no
    input requires one: adapters in the first layers of a frozen model.
    """
    is_missing = is_checkpointing(layer) and not any(t.requires_grad for t in tensors)
    if is_missing and any(parameter.requires_grad for parameter in layer.parameters()):
        return tensors[0].detach().requires_grad_(), *tensors[1:]
    return tensors
