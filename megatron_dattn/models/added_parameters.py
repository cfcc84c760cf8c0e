"""Parameters inside the language model that its pretrained original does not have.

Some presets add parameters to the decoder layers: gates, cross-attention, projectors of visual
tokens. They are new, as the adapter is, so everything that treats modules differently counts them
as the adapter's: learning rates, freezing, parameter counts, and whether a checkpoint holds them.
"""

import re
from collections.abc import Mapping
from typing import Any

# Checkpoints stack the layers into one tensor, whose key has no layer number.
_ADDED = re.compile(
    r"language_model\.decoder\.layers\.(\d+\.)?"
    r"(self_attention\.gate$|cross_attention\.|visual_projector\.)"
)
_POSITIONS = "adapter.positions."


def is_added(name: str) -> bool:
    """True if a parameter, or a key of a checkpoint, is such an addition.

    Args:
        name: with the whole model's prefix, but none of the wrappers' (`module.`).
    """
    return _ADDED.match(name) is not None


def comes_with_preset(name: str) -> bool:
    """True if a plain model lacks a parameter: such an addition, or the adapter's positions.

    Args:
        name: as for `is_added`.
    """
    return is_added(name) or name.startswith(_POSITIONS)


def holds_preset(facts: Mapping[str, Any]) -> bool:
    """True if a checkpoint of these facts holds what the attention preset adds to a plain model.

    A conversion from elsewhere does not; one without an adapter never does.
    """
    return "adapter" in facts.get("modules", ()) and bool(facts.get("has_added", True))
