"""Single values out of JSON that people and other programs write, each checked for its type.

A value of another type than the reader needs is one error that names it, wherever it would have
come to light.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dattn.errors import UserError

_SHOWN = 80


@dataclass(frozen=True)
class JsonFields:
    """An object out of a JSON file, or a section of one; its values, each of the type asked for."""

    values: Mapping[str, Any]
    where: str
    """What messages call it."""
    error: type[UserError]
    """What all methods raise for a value that is missing or of another type."""

    def whole(self, name: str, *, least: int | None = None) -> int:
        """A whole number, not below `least`."""
        value = self.present(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "a whole number")
        if least is not None and value < least:
            raise self.wrong(name, f"a whole number of at least {least}")
        return value

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.present(name)
        if not is_number(value):
            raise self.wrong(name, "a number")
        return float(value)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of so many finite numbers."""
        value = self.present(name)
        is_list = isinstance(value, list | tuple) and len(value) == count
        if not is_list or not all(map(is_number, value)):
            raise self.wrong(name, f"{count} numbers")
        return tuple(map(float, value))

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.present(name)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str) -> str:
        """A string."""
        value = self.present(name)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def section(self, name: str) -> dict[str, Any]:
        """An object."""
        value = self.present(name)
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return value

    def present(self, name: str) -> Any:
        """Any value, which must be there."""
        if name not in self.values:
            raise self.error(f"{self.where} lacks {name}")
        return self.values[name]

    def wrong(self, name: str, expected: str) -> UserError:
        """The error that says what a value must be."""
        value = show(self.values[name])
        return self.error(f"{self.where} has {name} {value}, but it must be {expected}")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def show(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
