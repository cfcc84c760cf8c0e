"""Chains of pointwise operations as one kernel on CUDA, by torch.compile; plain torch elsewhere.

Between matrix products and attention kernels an eager chain launches a kernel per operation, each
of a few microseconds, and the host can fall behind the device. On a CPU there is nothing to gain,
and compiling would call a C++ compiler.
"""

import logging
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from megatron_dattn.errors import shortened

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_MOST_GRAPHS = 64
_failures: list[str] = []  # the first one ends compiling in this process


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, compiled once for CUDA tensors of any number of tokens.

    For pure functions of tensors [tokens, ...], or sequences of them, that nobody differentiates.
    Where the compiler does not work (no Triton, an old GPU) it says so once and goes on uncompiled.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if _failures or not _is_cuda(args):
            return function(*args, **kwargs)
        prepared: Any = tuple(_prepared(value) for value in args)
        try:
            return _compiled(function)(*prepared, **kwargs)
        except _compiler_error() as error:
            _give_up(error)
            return function(*args, **kwargs)

    return call


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Sizes are constants of a kernel, but for those that `_prepared` marks: with dynamic=True every
    # kernel would divide by the number of heads, which it does not know.
    # Graphs differ in which parts a pack has, in strides and under inference mode, which is more
    # than the 8 for one function, behind which torch would go on uncompiled.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, _MOST_GRAPHS)
    return torch.compile(function, dynamic=False)


def _prepared(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_prepared, value))
    if not isinstance(value, Tensor):
        return value
    # A graph for tensors with and one for those without gradient would be the same.
    value = value.detach()
    # Packs differ in their numbers of tokens, and each new size would be compiled.
    torch._dynamo.maybe_mark_dynamic(value, 0)
    return value


def _is_cuda(values: Any) -> bool:
    """Whether the first tensor is on a CUDA device."""
    for value in values:
        if isinstance(value, list | tuple):
            return _is_cuda(value)
        if isinstance(value, Tensor):
            return value.is_cuda
    return False


def _compiler_error() -> type[Exception]:
    return torch._dynamo.exc.TorchDynamoException


def _give_up(error: Exception) -> None:
    lines = str(error).strip().splitlines() or ["no message"]
    _failures.append(f"{type(error).__name__}: {shortened(lines[0], 200)}")
    logger.warning(
        "torch.compile does not work here, so attention launches more kernels: %s", _failures[0]
    )
