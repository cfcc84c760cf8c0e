"""The names of the presets stand in a second place, which needs no torch."""

from megatron_dattn.attention import PRESETS
from megatron_dattn.preset_names import PRESET_NAMES


def test_the_names_are_those_of_the_presets() -> None:
    assert tuple(PRESETS) == PRESET_NAMES
