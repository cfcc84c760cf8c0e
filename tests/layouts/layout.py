"""A layout by its name: `tp2xpp2+sp` is two tensor-parallel ranks in each of two pipeline stages.

Sizes come first, joined by `x`, then what else is on, each behind a `+`. What a name does not say
is off, so one name is one comparable thing, in the matrix, on the command line and in the table.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from megatron_dattn.errors import ConfigError
from megatron_dattn.models.execution import ExactSavings

SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "dp": None,  # what is left of the ranks
}
OPTIONS: dict[str, dict[str, Any]] = {
    "sp": {"sequence_parallel": True},
    "distopt": {"use_distributed_optimizer": True},
    "overlap": {"overlap_grad_reduce": True},
    "uneven": {"num_layers_in_first_pipeline_stage": 1},
    "full": {"recompute": "full"},
    "selective": {"recompute": "selective"},
    "chunks": {"savings": ExactSavings(ffn_chunk_tokens=16)},
    "weights": {"encoder_tp_mode": "weights"},
    "tied": {},  # of the model: `Cell.config` sees to it
}
"""Settings by what they are called here."""

_NAME = re.compile(r"[a-z]+[1-9]\d*(x[a-z]+[1-9]\d*)*(\+[a-z]+)*")


@dataclass(frozen=True, order=True)
class Layout:
    """Sizes of the parallel axes and what else is on."""

    name: str

    def __post_init__(self) -> None:
        unknown = [size for size in self._named_sizes() if size not in SIZES]
        unknown += [option for option in self.options if option not in OPTIONS]
        if unknown or not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"'{self.name}' names no layout ({', '.join(unknown) or 'spelling'}); names are "
                f"made of {', '.join(f'{size}N' for size in SIZES)} joined by x, then "
                f"{', '.join(f'+{option}' for option in OPTIONS)}: tp2xpp2+sp"
            )

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(self.name.split("+")[1:])

    @property
    def num_ranks(self) -> int:
        return math.prod(size for name, size in self._named_sizes().items() if name != "vp")

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of the sections `parallel` and `execution`, by name."""
        named = ((SIZES[name], size) for name, size in self._named_sizes().items())
        sizes = {field: size for field, size in named if field is not None}
        # Sequence parallelism of some harnesses is on by default; a name says all.
        settings: dict[str, Any] = {**sizes, "sequence_parallel": False}
        for option in self.options:
            settings |= OPTIONS[option]
        return settings

    def _named_sizes(self) -> dict[str, int]:
        words = (word.rstrip("0123456789") for word in self._sizes())
        return {
            name: int(word.removeprefix(name) or 0)
            for name, word in zip(words, self._sizes(), strict=True)
        }

    def _sizes(self) -> list[str]:
        return self.name.split("+")[0].split("x")
