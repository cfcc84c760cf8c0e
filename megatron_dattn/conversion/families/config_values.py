"""Values out of a Hugging Face config.json, each checked for its type.

The files are edited by hand and written by many programs; null often stands for a default there.
"""

from dataclasses import dataclass
from typing import Any

from megatron_dattn.errors import CheckpointError, UserError
from megatron_dattn.runtime.json_fields import JsonFields


@dataclass(frozen=True)
class ConfigValues(JsonFields):
    """A config.json, or a section of one; all methods raise CheckpointError."""

    where: str = "config.json"
    error: type[UserError] = CheckpointError

    def whole_or_none(self, name: str) -> int | None:
        """None where it is null or missing."""
        return None if self.values.get(name) is None else self.whole(name)

    def number_or_none(self, name: str) -> float | None:
        """None where it is null or missing."""
        return None if self.values.get(name) is None else self.number(name)

    def flag(self, name: str) -> bool:
        """True or false; false where it is null or missing."""
        return False if self.values.get(name) is None else super().flag(name)

    def section_or_none(self, name: str) -> dict[str, Any] | None:
        """None where it is null or missing."""
        return None if self.values.get(name) is None else self.section(name)

    def check_present(self, names: tuple[str, ...]) -> None:
        """Raise CheckpointError, with all their names, if some are null or missing."""
        missing = [name for name in names if self.values.get(name) is None]
        if missing:
            raise self.error(f"{self.where} lacks {', '.join(missing)}")
