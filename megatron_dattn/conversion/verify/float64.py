"""Computes a model of either side in float64 throughout, to tell rounding from a fault.

Models name float32 in places where half precision would not do (norms, rotary tables, softmax), so
a model whose parameters are float64 still rounds there. Inside `arithmetic("fp64")` those places
mean float64 too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def arithmetic(dtype: str) -> Iterator[None]:
    """Inside of it, if `dtype` is "fp64", every torch function that is asked for float32 gives
    float64. Files of tensors are read outside: there a dtype says what the bytes are."""
    if dtype != "fp64":
        yield
        return
    with _Upgrade():
        yield


# There a dtype says what bytes are, not what is wanted.
_REINTERPRETING = (torch.Tensor.view, torch.frombuffer)


class _Upgrade(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _REINTERPRETING:
            return func(*args, **(kwargs or {}))
        wide = torch.Tensor.double if func is torch.Tensor.float else func
        named = {name: _upgraded(value) for name, value in (kwargs or {}).items()}
        return wide(*map(_upgraded, args), **named)


def _upgraded(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument
