"""Leaving out what megatron-core imports without need where there is no GPU.

It decorates functions with torch.compile (jit.py:21; moe/router.py:904 of 0.19), which imports
torch's compiler, 700 modules, on the spot; without a GPU nothing is compiled. And its timers, which
nobody here starts, import TensorBoard for the name of a type (timers.py:18).
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

_ENGINE = "megatron.core"
_TENSORBOARD = "torch.utils.tensorboard"


def leave_out_what_is_not_needed() -> None:
    """Do so when megatron-core is imported from now on; calling it again does no harm."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds megatron-core where it is, and hides what it need not find while it is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _ENGINE else None
        if spec is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_with_less(module: ModuleType) -> None:
                with _without_compiler(), _without_tensorboard():
                    execute(module)

            loader.exec_module = execute_with_less
        return spec


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Functions stay as they are: for ever, as `jit_fuser` is what torch.compile is here."""
    compiler = torch.compile
    if not torch.cuda.is_available():
        torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


def _as_it_is(function: Any = None, **options: Any) -> Any:
    """In place of torch.compile, with or without arguments."""
    return function if function is not None else _as_it_is


@contextlib.contextmanager
def _without_tensorboard() -> Iterator[None]:
    """It is as if it were not installed, for which the timers are prepared."""
    if _TENSORBOARD in sys.modules:
        yield
        return
    sys.modules[_TENSORBOARD] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[_TENSORBOARD]
