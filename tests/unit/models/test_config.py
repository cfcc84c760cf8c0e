"""Model configurations that are refused."""

from typing import Any

import pytest

from megatron_dattn.errors import ConfigError
from megatron_dattn.models.config import AdapterConfig, LanguageConfig, ModelConfig


def test_features_wider_than_the_decoder_cannot_be_carried_through_it() -> None:
    language = LanguageConfig(hidden_size=1024, num_attention_heads=8, num_key_value_heads=2)
    with pytest.raises(ConfigError, match=r"'saisa'.*1152 is larger than.*1024"):
        ModelConfig(language=language, attention="saisa")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"attn_logit_softcapping": 50.0}),
        ("mistral", {"hidden_activation": "gelu_pytorch_tanh"}),
        ("llama", {"sliding_window": 4096}),
        ("llama", {"query_pre_attn_scalar": 128.0}),
    ],
)
def test_fields_of_other_families_are_refused(family: Any, changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(ConfigError, match=rf"language\.{name} .* '{family}' has; leave it out"):
        LanguageConfig(family=family, **changes)


@pytest.mark.parametrize("name", ["attn_logit_softcapping", "sliding_window"])
def test_a_cap_or_window_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"language\.{name} must be positive, got 0"):
        LanguageConfig(family="gemma2", **{name: 0})


@pytest.mark.parametrize(
    ("vocab_size", "tokens"),
    [(32000, 32000), (32064, 32064), (32768, 32768), (128256, 128256), (256000, 256000),
     (32001, 32064), (1, 64)],
)  # fmt: skip
def test_published_vocabularies_need_no_padding(vocab_size: int, tokens: int) -> None:
    assert LanguageConfig(vocab_size=vocab_size).padded_vocab_size == tokens


def test_an_unknown_preset_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'dattention' is unknown; choose one of s_attn, "):
        ModelConfig(attention="dattention")


@pytest.mark.parametrize("attention", ["vidi", "s_attn", "saisa"])
def test_positions_per_patch_are_refused_where_none_are_learned(attention: str) -> None:
    with pytest.raises(ConfigError, match=r"visual_position 'per_patch' has no effect"):
        ModelConfig(adapter=AdapterConfig(visual_position="per_patch"), attention=attention)
