"""Values out of a Hugging Face config.json, each checked for its type.

The files are edited by hand and written by many programs; a value of another type than the model
needs is one error that names it, wherever it would have come to light.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dattn.errors import CheckpointError


@dataclass(frozen=True)
class ConfigValues:
    """A config.json, or a section of one."""

    values: Mapping[str, Any]
    where: str = "config.json"
    """What messages call it."""

    def whole(self, name: str) -> int:
        """A whole number.

        Raises:
            CheckpointError: there is none; so do all methods.
        """
        value = self._present(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "a whole number")
        return value

    def number(self, name: str) -> float:
        """A finite number."""
        value = self._present(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise self._wrong(name, "a number")
        return float(value)

    def whole_or_none(self, name: str) -> int | None:
        """None where it is null or missing."""
        return None if self.values.get(name) is None else self.whole(name)

    def number_or_none(self, name: str) -> float | None:
        """None where it is null or missing."""
        return None if self.values.get(name) is None else self.number(name)

    def flag(self, name: str) -> bool:
        """True or false; false where it is null or missing."""
        value = self.values.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def section(self, name: str) -> dict[str, Any]:
        """An object."""
        value = self._present(name)
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return value

    def section_or_none(self, name: str) -> dict[str, Any] | None:
        """None where it is null or missing."""
        return None if self.values.get(name) is None else self.section(name)

    def check_present(self, names: tuple[str, ...]) -> None:
        """Raise CheckpointError, with all their names, if some are null or missing."""
        missing = [name for name in names if self.values.get(name) is None]
        if missing:
            raise CheckpointError(f"{self.where} lacks {', '.join(missing)}")

    def _present(self, name: str) -> Any:
        if name not in self.values:
            raise CheckpointError(f"{self.where} lacks {name}")
        return self.values[name]

    def _wrong(self, name: str, expected: str) -> CheckpointError:
        value = json.dumps(self.values[name])
        return CheckpointError(f"{self.where} has {name} {value}, but it must be {expected}")
