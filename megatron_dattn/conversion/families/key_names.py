"""What a checkpoint of a whole vision-language model calls its tensors.

LLaVAs exist with two sets of names, from before and after transformers 4.52 put everything but the
head into a module `model`; our exports have the newer ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass

_ENCODER = "vision_tower."
DEEPER_ENCODER = "vision_tower.vision_model."


@dataclass(frozen=True)
class KeyNames:
    """One set of names; the newer one by default."""

    nested: bool = True
    """Whether all but the head are in a module `model`."""
    vision_module: str = _ENCODER
    """Where the encoder's own names begin: `vision_tower.` or `vision_tower.vision_model.`."""

    def vision(self, name: str) -> str:
        """The name of a tensor that a checkpoint of the encoder alone calls `name`."""
        return f"{self._outer}{self.vision_module}{name}"

    def projector(self, name: str) -> str:
        return f"{self._outer}multi_modal_projector.{name}"

    def language(self, name: str) -> str:
        """The name of a tensor that a checkpoint of the language model alone calls `name`."""
        if not self.nested:
            return f"language_model.{name}"
        inner = name.removeprefix("model.")
        return name if inner == name else f"model.language_model.{inner}"

    @property
    def _outer(self) -> str:
        return "model." if self.nested else ""


def key_names(names: Iterable[str]) -> KeyNames:
    """The names that a checkpoint uses, from all of them."""
    found = tuple(names)
    nested = not any(name.startswith("language_model.") for name in found)
    is_deeper = any(name.removeprefix("model.").startswith(DEEPER_ENCODER) for name in found)
    return KeyNames(nested, DEEPER_ENCODER if is_deeper else _ENCODER)
