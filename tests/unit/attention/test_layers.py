"""Rules per layer: who freezes, who leaves, and what nobody reads."""

from dataclasses import replace

import pytest

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.layers import layer_rules, output_tokens
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.visual_config import (
    VisualTokensConfig,
)
from megatron_dattn.errors import ConfigError
from tests.unit.attention.support import RICH_LAYOUT

ITSELF = list(range(15, 31))

LAYOUT = TokenLayout((2, 1), (ImageSpan(0, 1, (2, 2)),), visual_budget=6, text_budget=4)


def outline(preset: str, num_layers: int, *, skip_unread: bool) -> str:
    """A letter per layer: Full, with Part of the FFN, Read only, Gone."""
    letters = []
    for rule in layer_rules(PRESETS[preset], num_layers, skip_unread=skip_unread):
        if not rule.sees_images:
            letters.append("G")
        elif rule.attention.v2v == "none" and rule.visual_ffn == 0.0:
            letters.append("R")
        else:
            letters.append("F" if rule.visual_ffn == 1.0 else "P")
    return "".join(letters)


@pytest.mark.parametrize(
    ("preset", "everything", "what_is_read"),
    [
        ("dattn", "FFFFFF", "FFFFFR"),
        # The image's last token predicts the token after it: it is read.
        ("s_attn", "FFFFFF", "FFFFFF"),
        ("naavit", "FFFFFF", "FFFFFR"),
        ("saisa", "RRRRRR", "RRRRRR"),
        ("shortv", "FFRRRR", "FFRRRR"),
        ("exit", "FFFGGG", "FFRGGG"),
        ("yopo", "PPPGGG", "PPRGGG"),
        ("fastervlm", "FFFFFF", "FFFFFF"),
    ],
)
def test_rules_of_six_layers(preset: str, everything: str, what_is_read: str) -> None:
    assert outline(preset, 6, skip_unread=False) == everything
    assert outline(preset, 6, skip_unread=True) == what_is_read


def test_a_single_layer_still_sees_images() -> None:
    assert outline("exit", 1, skip_unread=False) == "F"
    assert outline("dattn", 1, skip_unread=True) == "R"


def test_tokens_that_are_gone_leave_the_layout() -> None:
    first, last = layer_rules(PRESETS["exit"], 2, skip_unread=False)
    assert first.layout(LAYOUT) == LAYOUT
    assert last.layout(LAYOUT) == TokenLayout((2, 1), (), visual_budget=0, text_budget=4)


@pytest.mark.parametrize("num_layers", [4, 5, 32, 33])
@pytest.mark.parametrize("end", [0.9, 0.99, 0.9999, 1.0])
def test_who_predicts_is_computed(num_layers: int, end: float) -> None:
    """The last layer is frozen exactly where the configuration says that no image's token predicts,
    however the range is rounded."""
    config = replace(PRESETS["s_attn"], visual=VisualTokensConfig(frozen=(0.4, end)))
    for skip_unread in (False, True):
        last = layer_rules(config, num_layers, skip_unread=skip_unread)[-1]
        assert last.attention.scores_visual_tokens == config.visual_tokens_predict == (end < 1.0)


def test_a_range_without_a_layer_is_refused() -> None:
    config = replace(PRESETS["s_attn"], visual=VisualTokensConfig(frozen=(0.5, 0.6)))
    with pytest.raises(ConfigError, match=r"frozen=\(0.5, 0.6\) is none of 2 layers"):
        layer_rules(config, 2, skip_unread=False)


@pytest.mark.parametrize("preset", ["dattn", "dattn_biased", "dattn_sum", "vidi"])
def test_text_that_sees_all_images_predicts_for_itself(preset: str) -> None:
    assert output_tokens(RICH_LAYOUT, PRESETS[preset]).tolist() == ITSELF


@pytest.mark.parametrize("preset", ["ee_mllm", "naavit"])
def test_images_that_read_no_text_predict_nothing(preset: str) -> None:
    """Though text does not see the image that follows it."""
    assert output_tokens(RICH_LAYOUT, PRESETS[preset]).tolist() == ITSELF


@pytest.mark.parametrize("preset", ["s_attn", "s_attn_debias", "aki"])
def test_text_before_an_image_hands_its_prediction_to_the_image(preset: str) -> None:
    expected = ITSELF.copy()
    expected[1] = 4  # two images follow text token 1 of sample 0: the second one's last token
    expected[4] = 7  # the image after the last text token, where no label is left to predict
    expected[12] = 11  # sample 3; the image of sample 2 stands before all text and takes nothing
    assert output_tokens(RICH_LAYOUT, PRESETS[preset]).tolist() == expected


def test_the_centre_of_a_concentric_image_predicts() -> None:
    """The last token in reading order is a corner, which sees the border alone."""
    layout = TokenLayout((2,), (ImageSpan(0, 1, (3, 5)),), visual_budget=15, text_budget=2)
    assert output_tokens(layout, PRESETS["cca"]).tolist() == [1 * 5 + 3, 16]
