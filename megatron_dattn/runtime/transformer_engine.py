"""Whether Transformer Engine can be used, found out before megatron-core imports it.

Its core and its part for torch are two installations. megatron-core asks for the core alone and
then fails in its own imports where the other is missing or was built for another torch.
"""

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec

_NAME = "transformer_engine"


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
    except Exception as error:  # whatever its start raises: a missing file, a symbol, an assertion
        sys.modules[_NAME] = None  # type: ignore[assignment]
        lines = str(error).strip().splitlines() or [""]
        return f"its part for torch does not load ({type(error).__name__}: {lines[0]})"
    return None
