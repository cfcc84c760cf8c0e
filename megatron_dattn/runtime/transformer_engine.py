"""Whether Transformer Engine can be used, found out before megatron-core imports it.

Its core and its part for torch are two installations. megatron-core asks for the core alone and
then fails in its own imports where the other is missing or was built for another torch.
"""

import re
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec

_NAME = "transformer_engine"
_MIN_VERSION = (2, 6)
# Asked of the device and its CUDA, by recipe.
_FP8_CHECKS = {
    "tensorwise": "check_fp8_support",
    "delayed": "check_fp8_support",
    "blockwise": "check_fp8_block_scaling_support",
}


@cache
def te_failure() -> str | None:
    """The reason why Transformer Engine cannot be used; None if it can.

    One that is not whole is hidden from all later imports, so call this before megatron-core is
    imported.
    """
    if find_spec(_NAME) is None:
        return "it is not installed"
    try:
        import_module(f"{_NAME}.pytorch")
        version = str(import_module(_NAME).__version__)
    except Exception as error:  # whatever its start raises: a missing file, a symbol, an assertion
        _hide()
        lines = str(error).strip().splitlines() or [""]
        return f"its part for torch does not load ({type(error).__name__}: {lines[0]})"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _MIN_VERSION:
        _hide()
        return f"version {version} is older than {'.'.join(map(str, _MIN_VERSION))}"
    return None


def _hide() -> None:
    # A part that has been loaded is found by its whole name, without asking for the package.
    for name in {_NAME, *(name for name in sys.modules if name.startswith(f"{_NAME}."))}:
        sys.modules[name] = None  # type: ignore[assignment]


def fp8_failure(recipe: str) -> str | None:
    """The reason why this device cannot multiply in FP8 by that recipe; None if it can.

    Transformer Engine must be usable (`te_failure`).
    """
    try:
        checks = import_module(f"{_NAME}.pytorch.quantization")
    except ImportError:  # an older one, where the module has another name
        checks = import_module(f"{_NAME}.pytorch.fp8")
    supported, reason = getattr(checks, _FP8_CHECKS[recipe])()
    return None if supported else reason
