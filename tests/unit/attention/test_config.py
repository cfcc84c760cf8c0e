"""Presets and the combinations of axes that have no meaning."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_dattn.attention import PRESETS, AttentionConfig, get_preset
from megatron_dattn.attention.config import Positions, TextToVisual
from megatron_dattn.attention.visual_config import VisualTokensConfig
from megatron_dattn.errors import ConfigError

IN_SEQUENCE = Positions(text="gap", visual="sequence", embedding="none")


def test_presets_are_the_cells_of_the_papers_ablation() -> None:
    cells = {
        name: (PRESETS[name].v2v == "diagonal", not PRESETS[name].t2v.rotary)
        for name in ("s_attn", "dattn", "dattn_biased", "s_attn_debias")
    }
    assert cells == {
        "s_attn": (False, False),
        "dattn_biased": (True, False),
        "dattn": (True, True),
        "s_attn_debias": (False, True),
    }


def test_the_default_is_the_papers_method() -> None:
    assert AttentionConfig() == get_preset("dattn")


def test_the_merges_change_nothing_else() -> None:
    for merge in ("sum", "tanh", "sigmoid", "cascade"):
        assert replace(PRESETS[f"dattn_{merge}"], merge="alpha") == PRESETS["dattn"]


def test_plain_self_attention_is_recognized() -> None:
    plain = ["s_attn", "shortv", "exit", "fastervlm"]
    others = ["dattn", "s_attn_debias", "ee_mllm", "naavit", "aki", "cca", "yopo", "saisa"]
    assert all(PRESETS[name].attends_in_reading_order for name in plain)
    assert not any(PRESETS[name].attends_in_reading_order for name in others)
    assert {replace(PRESETS[name], visual=VisualTokensConfig()) for name in plain} == {
        PRESETS["s_attn"]
    }


def test_an_image_predicts_only_where_its_last_layer_has_read_the_text_before() -> None:
    predicting = ["s_attn", "s_attn_debias", "aki", "cca", "fastervlm"]
    others = ["dattn", "vidi", "ee_mllm", "naavit", "saisa", "shortv", "exit", "yopo"]
    assert all(PRESETS[name].visual_tokens_predict for name in predicting)
    assert not any(PRESETS[name].visual_tokens_predict for name in others)


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'dattention'; choose one of s_attn, dattn, "):
        get_preset("dattention")


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"v2t": "preceding", "t2v": TextToVisual("following")}, "visual tokens no scores"),
        (
            {"v2v": "causal", "v2t": "preceding", "positions": IN_SEQUENCE},
            "see, through the image, text that comes after itself",
        ),
        (
            {"v2v": "causal", "v2t": "prompt", "positions": IN_SEQUENCE},
            "v2t='prompt' and t2v.scope='all'",
        ),
        ({"v2v": "none", "v2t": "prompt", "t2v": TextToVisual("following")}, "v2v='none' gives"),
        ({"v2v": "window"}, "needs an odd v2v_window, .* it is None"),
        ({"v2v": "window", "v2v_window": 4}, "needs an odd v2v_window, .* it is 4"),
        ({"v2v_window": 3}, "v2v_window=3 has no effect"),
        ({"v2v": "causal"}, "need positions.visual='sequence'"),
        ({"v2v": "ring"}, "need positions.visual='sequence' or 'ring'"),
        ({"positions": Positions(text="gap", visual="ring")}, "visual='ring' has no effect"),
        ({"t2v": TextToVisual(rotary=True)}, "need positions.visual='sequence'"),
        ({"positions": IN_SEQUENCE}, "has no effect"),
        (
            {"v2v": "causal", "positions": Positions(text="text_only", visual="sequence")},
            "set positions.text='gap'",
        ),
        (
            {"visual": VisualTokensConfig(source="reproject", ffn=0.0)},
            "no state that v2v='diagonal'",
        ),
        (
            {"v2v": "none", "visual": VisualTokensConfig(source="reproject", ffn=0.0)},
            "no tokens to embed",
        ),
        (
            {
                "v2v": "window",
                "v2v_window": 3,
                "positions": IN_SEQUENCE,
                "visual": VisualTokensConfig(keep=0.5),
            },
            "keep=0.5 leaves no grid",
        ),
        (
            {"merge": "sum", "visual": VisualTokensConfig(heads=0.5)},
            "defined for merge='alpha', not 'sum'",
        ),
        (
            {
                "v2v": "causal",
                "t2v": TextToVisual("following"),
                "positions": IN_SEQUENCE,
                "merge": "cascade",
            },
            "asks for text tokens alone, but v2v='causal' makes visual tokens ask",
        ),
        (
            {"visual": VisualTokensConfig(exit=0.5, frozen=(0.6, 1.0))},
            r"frozen=\(0.6, 1.0\) begins where",
        ),
        ({"visual": VisualTokensConfig(exit=0.5, frozen=(0.5, 1.0))}, "visual tokens are gone"),
        (
            {"v2v": "none", "visual": VisualTokensConfig(ffn=0.0, frozen=(0.5, 1.0))},
            "with v2v='none' and visual.ffn=0 no layer changes visual tokens",
        ),
        (
            {
                "v2v": "causal",
                "v2t": "preceding",
                "t2v": TextToVisual("following", rotary=True, window="inherit"),
                "positions": IN_SEQUENCE,
            },
            "window counts all tokens in reading order",
        ),
        ({"window": "reading_order"}, "t2v.scope='all' shows it images behind it"),
        (
            {"t2v": TextToVisual("following", window="inherit"), "window": "reading_order"},
            "leave one of the two out",
        ),
        (
            {
                "v2v": "causal",
                "t2v": TextToVisual("following"),
                "positions": IN_SEQUENCE,
                "window": "reading_order",
            },
            "is for visual tokens without scores",
        ),
    ],
)
def test_meaningless_combinations_are_refused(axes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttentionConfig(**axes)


@pytest.mark.parametrize(
    ("axes", "values", "message"),
    [
        (AttentionConfig, {"v2v": "diag"}, "attention: v2v is one of 'causal', .*; it is 'diag'"),
        (AttentionConfig, {"v2t": "pre"}, "v2t is one of 'none', 'preceding', 'prompt'"),
        (AttentionConfig, {"merge": "gated"}, "merge is one of .*'cascade'; it is 'gated'"),
        (AttentionConfig, {"window": "text"}, "window is one of 'part', 'reading_order'"),
        (TextToVisual, {"scope": "post"}, "t2v.scope is one of 'all', 'following'; it is 'post'"),
        (TextToVisual, {"rotary": "off"}, "t2v.rotary is True or False; it is 'off'"),
        (TextToVisual, {"window": True}, "t2v.window is one of 'none', 'inherit'; it is True"),
        (Positions, {"text": "nogap"}, "positions.text is one of 'gap', 'text_only'"),
        (Positions, {"visual": "rings"}, "positions.visual is one of"),
        (Positions, {"embedding": None}, "positions.embedding is one of .*; it is None"),
        (VisualTokensConfig, {"source": "pooled"}, "visual.source is one of 'stream', 'reproject'"),
        (AttentionConfig, {"v2v": "window", "v2v_window": "3"}, "an odd v2v_window"),
    ],
)
def test_values_that_an_axis_does_not_have_are_refused(
    axes: type, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        axes(**values)
