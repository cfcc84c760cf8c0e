"""All presets, and what context parallelism says to each."""

import dataclasses

import pytest

from megatron_dattn.attention import PRESETS, AttentionConfig
from megatron_dattn.attention.config import TextToVisual
from megatron_dattn.errors import ConfigError
from megatron_dattn.parallel.context.supported import check_preset, nearest_served, unserved

SERVED = {
    *("dattn", "dattn_biased", "dattn_sum", "dattn_tanh", "dattn_sigmoid", "dattn_cascade"),
    *("vidi", "ee_mllm", "naavit", "saisa"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_served_or_refused_with_the_reason(name: str) -> None:
    check_preset(name, 1)
    if name in SERVED:
        check_preset(name, 2)
        return
    with pytest.raises(ConfigError) as caught:
        check_preset(name, 2)
    message = str(caught.value)
    assert f"model.attention '{name}'" in message
    assert f"v2v='{PRESETS[name].v2v}'" in message
    assert f"the nearest preset that it serves is '{nearest_served(name)}'" in message
    assert nearest_served(name) in SERVED


def test_the_nearest_of_plain_self_attention_reads_images_in_the_same_way() -> None:
    assert nearest_served("s_attn") == "ee_mllm"
    assert nearest_served("dattn") == "dattn"


def test_a_window_that_counts_images_is_refused() -> None:
    config = AttentionConfig(t2v=TextToVisual("following"), window="reading_order")
    assert "counts images" in (unserved(config) or "")
    assert unserved(dataclasses.replace(config, window="part")) is None
