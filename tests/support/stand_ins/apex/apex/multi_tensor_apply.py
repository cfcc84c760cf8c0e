"""The call of a kernel over lists of tensors."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def multi_tensor_applier(
    op: Callable[..., Any], noop_flag_buffer: Tensor, tensor_lists: list[list[Tensor]], *args: Any
) -> Any:
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)
