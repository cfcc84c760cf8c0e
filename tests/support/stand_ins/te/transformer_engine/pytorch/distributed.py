"""Recomputation and random states."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager


class CudaRNGStatesTracker:
    def __init__(self) -> None:
        self.states_: dict[str, Tensor] = {}

    def reset(self) -> None:
        self.states_ = {}


@contextlib.contextmanager
def activation_recompute_forward(
    activation_recompute: bool = False, recompute_phase: bool = False
) -> Iterator[None]:
    yield


def is_fp8_activation_recompute_enabled() -> bool:
    return False


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Any = None,
    tp_group: Any = None,
    **kwargs: Any,
) -> Any:
    """The repetition runs under the recipe of the first pass, wherever the backward pass is."""
    recipe = FP8GlobalStateManager.get_fp8_recipe()

    def again(*values: Any) -> Any:
        former, FP8GlobalStateManager.recipe = FP8GlobalStateManager.recipe, recipe
        try:
            return function(*values, **kwargs)
        finally:
            FP8GlobalStateManager.recipe = former

    return torch.utils.checkpoint.checkpoint(again, *args, use_reentrant=True)
