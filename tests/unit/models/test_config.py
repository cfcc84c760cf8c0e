"""Model configurations that are refused, and facts of older checkpoints."""

from dataclasses import asdict
from typing import Any

import pytest

from megatron_dattn.errors import ConfigError
from megatron_dattn.models.config import (
    FIELDS_WITHOUT_EFFECT,
    AdapterConfig,
    AdapterNorm,
    LanguageConfig,
    ModelConfig,
    with_later_fields,
)


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


def _facts(attention: str, **adapter: Any) -> dict[str, Any]:
    return {"model": asdict(ModelConfig(adapter=AdapterConfig(**adapter), attention=attention))}


@pytest.mark.parametrize(
    ("attention", "older", "norm"),
    [("dattn", True, "before"), ("s_attn", False, "none"), ("vidi", True, "before")],
)
def test_facts_from_before_the_norms_place_say_what_they_meant(
    attention: str, older: bool, norm: AdapterNorm
) -> None:
    """Facts as they were written then: no place, no kind of positions, another text_scale."""
    then = _facts(attention)
    adapter = {"input_norm": older, "hidden_size": None, "norm_eps": 1e-5, "max_grid": 64}
    then["model"]["adapter"] = {**adapter, "text_scale": 0.02}
    found, wanted = with_later_fields(then), with_later_fields(_facts(attention, norm=norm))
    differing = {name for name, value in wanted["model"]["adapter"].items()
                 if found["model"]["adapter"][name] != value}  # fmt: skip
    assert differing == {"text_scale"}, "which decides nothing once there are weights"
    assert "adapter.text_scale" in FIELDS_WITHOUT_EFFECT
    assert found["model"]["adapter"].keys() == wanted["model"]["adapter"].keys()


def test_a_norm_left_to_the_preset_is_the_norm_by_name() -> None:
    for attention, norm in (("vidi", "behind"), ("dattn", "before"), ("s_attn", "before")):
        left, named = (_facts(attention), _facts(attention, norm=norm))
        assert with_later_fields(left) == with_later_fields(named)
        assert with_later_fields(with_later_fields(left)) == with_later_fields(left)


@pytest.mark.parametrize("attention", ["vidi", "s_attn", "saisa"])
def test_positions_per_patch_are_refused_where_none_are_learned(attention: str) -> None:
    with pytest.raises(ConfigError, match=r"visual_position 'per_patch' has no effect"):
        ModelConfig(adapter=AdapterConfig(visual_position="per_patch"), attention=attention)
