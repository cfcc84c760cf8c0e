"""What no Hugging Face form computes is refused by name, with the reason; all else has one."""

from dataclasses import replace

import pytest

from megatron_dattn.attention import PRESETS, AttentionConfig
from megatron_dattn.attention.config import TextToVisual
from megatron_dattn.attention.visual_config import VisualTokensConfig
from megatron_dattn.conversion.families.exportable import check_exportable, image_rows
from megatron_dattn.errors import ConfigError
from megatron_dattn.models.config import AdapterConfig, LanguageConfig, ModelConfig


@pytest.mark.parametrize(
    ("preset", "reason"),
    [
        ("s_attn", "adapter.norm is 'before'; train with model.adapter.norm set to none"),
        ("s_attn_debias", "v2v='causal'"),
        ("aki", "v2v='causal'"),
        ("cca", "v2v='ring'"),
        ("yopo", "v2v='window'"),
        ("exit", "v2v='causal'"),
        ("fastervlm", "v2v='causal'"),
        ("shortv", "v2v='causal'"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(preset, reason):
    with pytest.raises(ConfigError, match=f"'{preset}' cannot be exported: .*{reason}"):
        check_exportable(ModelConfig(attention=preset))


def test_all_other_presets_can_be_exported():
    decomposed = {name for name, axes in PRESETS.items() if axes.v2v in ("diagonal", "none")}
    assert {name for name in PRESETS if name.startswith("dattn")} <= decomposed
    for preset in decomposed:
        check_exportable(ModelConfig(attention=preset))


GEMMA2 = LanguageConfig(
    family="gemma2", hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=144.5
)


def test_llava_alone_looks_image_up():
    llama = LanguageConfig(family="llama", vocab_size=100)
    llava = ModelConfig(language=llama, adapter=AdapterConfig(norm="none"), attention="s_attn")
    assert [image_rows(llava, index) for index in (5, 99, 100, 101)] == [0, 0, 1, 2]
    assert image_rows(ModelConfig(language=llama), 100) == 0


def test_what_hugging_face_s_classes_cannot_hold_is_refused():
    with pytest.raises(ConfigError, match=r"'dattn' cannot be exported: .*144\.5.* whole numbers"):
        check_exportable(ModelConfig(language=GEMMA2))
    llava = ModelConfig(language=GEMMA2, adapter=AdapterConfig(norm="none"), attention="s_attn")
    with pytest.raises(ConfigError, match="in transformers 4, and does not in 5"):
        check_exportable(llava)


def test_a_preset_that_thins_visual_rows_is_refused(monkeypatch):
    thinned = replace(PRESETS["dattn"], visual=VisualTokensConfig(ffn=0.5))
    monkeypatch.setitem(PRESETS, "dattn", thinned)
    with pytest.raises(ConfigError, match="every layer whole"):
        check_exportable(ModelConfig())


@pytest.mark.parametrize(
    "axes",
    [
        AttentionConfig(t2v=TextToVisual(window="inherit")),
        AttentionConfig(t2v=TextToVisual("following"), window="reading_order"),
    ],
    ids=["inherit", "reading_order"],
)
def test_a_preset_whose_images_fall_out_of_a_window_is_refused(monkeypatch, axes):
    monkeypatch.setitem(PRESETS, "forgetful", axes)
    with pytest.raises(ConfigError, match=r"'forgetful' cannot be exported: .* sliding window"):
        check_exportable(ModelConfig(attention="forgetful"))
