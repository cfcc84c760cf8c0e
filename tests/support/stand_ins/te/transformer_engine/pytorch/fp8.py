"""Whether FP8 is on, with which recipe, and what it asks of sizes."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from transformer_engine.common.recipe import Recipe


class FP8GlobalStateManager:
    recipe: Recipe | None = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None

    @classmethod
    def get_fp8_recipe(cls) -> Recipe | None:
        return cls.recipe


@contextlib.contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Recipe | None = None,
    fp8_group: Any = None,
) -> Iterator[None]:
    former = FP8GlobalStateManager.recipe
    FP8GlobalStateManager.recipe = fp8_recipe if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = former


def fp8_model_init(enabled: bool = True, recipe: Recipe | None = None) -> Any:
    raise AssertionError("parameters of ours are never FP8")


def check_fp8_support() -> tuple[bool, str]:
    return True, ""


def check_fp8_block_scaling_support() -> tuple[bool, str]:
    return True, ""


def assert_dim_for_fp8_exec(*tensors: Tensor) -> None:
    for tensor in tensors:
        leading = math.prod(tensor.shape[:-1])
        if leading % 8 or tensor.shape[-1] % 16:
            raise AssertionError(
                "FP8 execution requires the product of all dimensions except the last to be"
                " divisible by 8 and the last dimension to be divisible by 16, but got tensor with"
                f" dims={list(tensor.shape)}"
            )
