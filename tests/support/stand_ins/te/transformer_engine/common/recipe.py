"""How FP8 tensors are scaled. Unknown arguments are taken and forgotten, as pydantic does there."""

from enum import Enum
from typing import Any


class Format(Enum):
    E4M3 = (448.0, 448.0)
    E5M2 = (57344.0, 57344.0)
    HYBRID = (448.0, 57344.0)


class Recipe:
    def __init__(self, *, fp8_format: Format = Format.HYBRID, **unused: Any) -> None:
        assert fp8_format != Format.E5M2, "Pure E5M2 training is not supported."
        self.fp8_format = fp8_format

    def delayed(self) -> bool:
        return isinstance(self, DelayedScaling)


class DelayedScaling(Recipe):
    def __init__(self, *, amax_history_len: int = 1024, **settings: Any) -> None:
        super().__init__(**settings)
        self.amax_history_len = amax_history_len


class Float8CurrentScaling(Recipe):
    pass


class Float8BlockScaling(Recipe):
    pass


class MXFP8BlockScaling(Recipe):
    pass
