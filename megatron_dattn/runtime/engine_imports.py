"""What megatron-core finds when it is imported: Transformer Engine whole or not, and no more.

Transformer Engine's core and its part for torch are two installations. megatron-core asks for the
core alone and then fails in its own imports where the other is missing or was built for another
torch.

Without a GPU it imports much without need. It decorates functions with torch.compile (jit.py:21;
moe/router.py:904 of 0.19), which imports torch's compiler, 700 modules, on the spot; without a GPU
nothing is compiled. And its timers, which nobody here starts, import TensorBoard for the name of a
type (timers.py:18).
"""

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

_ENGINE = "megatron.core"
_TENSORBOARD = "torch.utils.tensorboard"
_TE = "transformer_engine"
_MIN_TE_VERSION = (2, 6)
# Asked of the device and its CUDA, by recipe.
_FP8_CHECKS = {
    "tensorwise": "check_fp8_support",
    "delayed": "check_fp8_support",
    "blockwise": "check_fp8_block_scaling_support",
}

TE_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Norms that Transformer Engine's linear layers own, as checkpoints name them, and what they are
called where they are modules."""


def prepare_engine_imports() -> None:
    """Call it before megatron-core is imported; calling it again does no harm."""
    te_failure()
    is_prepared = any(isinstance(finder, _Finder) for finder in sys.meta_path)
    if _ENGINE not in sys.modules and not is_prepared:
        sys.meta_path.insert(0, _Finder())


@cache
def te_failure() -> str | None:
    """The reason why Transformer Engine cannot be used; None if it can.

    One that is not whole is hidden from all later imports, so call this before megatron-core is
    imported.
    """
    if find_spec(_TE) is None:
        return "it is not installed"
    try:
        import_module(f"{_TE}.pytorch")
        version = str(import_module(_TE).__version__)
    except Exception as error:  # whatever its start raises: a missing file, a symbol, an assertion
        _hide_te()
        lines = str(error).strip().splitlines() or [""]
        return f"its part for torch does not load ({type(error).__name__}: {lines[0]})"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _MIN_TE_VERSION:
        _hide_te()
        return f"version {version} is older than {'.'.join(map(str, _MIN_TE_VERSION))}"
    return None


def _hide_te() -> None:
    # A part that has been loaded is found by its whole name, without asking for the package.
    for name in {_TE, *(name for name in sys.modules if name.startswith(f"{_TE}."))}:
        sys.modules[name] = None  # type: ignore[assignment]


def fp8_failure(recipe: str) -> str | None:
    """The reason why this device cannot multiply in FP8 by that recipe; None if it can.

    Transformer Engine must be usable (`te_failure`).
    """
    try:
        checks = import_module(f"{_TE}.pytorch.quantization")
    except ImportError:  # an older one, where the module has another name
        checks = import_module(f"{_TE}.pytorch.fp8")
    supported, reason = getattr(checks, _FP8_CHECKS[recipe])()
    return None if supported else reason


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
                sys.meta_path.remove(self)  # it would be asked for every later import

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
