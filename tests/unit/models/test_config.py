"""Model configurations that are refused."""

import pytest

from megatron_dattn.attention import PRESETS
from megatron_dattn.errors import ConfigError
from megatron_dattn.models.config import ModelConfig


@pytest.mark.parametrize("preset", [name for name, c in PRESETS.items() if c.has_gate])
def test_a_merge_without_its_gates_is_refused(preset: str) -> None:
    with pytest.raises(ConfigError, match=f"'{preset}' merges by learnable gates"):
        ModelConfig(attention=preset)
