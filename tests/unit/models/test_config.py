"""Model configurations that are refused."""

import pytest

from megatron_dattn.errors import ConfigError
from megatron_dattn.models.config import ModelConfig


@pytest.mark.parametrize("preset", ["dattn_tanh", "dattn_sigmoid"])
def test_a_merge_without_its_gates_is_refused(preset: str) -> None:
    with pytest.raises(ConfigError, match=f"'{preset}' needs parts"):
        ModelConfig(attention=preset)
