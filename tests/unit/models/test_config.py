"""Model configurations that are refused."""

import pytest

from megatron_dattn.errors import ConfigError
from megatron_dattn.models.config import LanguageConfig, ModelConfig


def test_features_wider_than_the_decoder_cannot_be_carried_through_it() -> None:
    language = LanguageConfig(hidden_size=1024, num_attention_heads=8, num_key_value_heads=2)
    with pytest.raises(ConfigError, match=r"'saisa'.*1152 is larger than.*1024"):
        ModelConfig(language=language, attention="saisa")


def test_an_unknown_preset_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'dattention' is unknown; choose one of s_attn, "):
        ModelConfig(attention="dattention")
