"""Rules per layer: who freezes, who leaves, and what nobody reads."""

from dataclasses import replace

import pytest

from megatron_dattn.attention import PRESETS, ImageSpan, TokenLayout
from megatron_dattn.attention.layers import layer_rules
from megatron_dattn.attention.visual_config import (
    VisualTokensConfig,
    kept_grid,
    num_shared,
    rounded_share,
)
from megatron_dattn.errors import ConfigError

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


def test_kept_patches_form_a_line() -> None:
    assert kept_grid((4, 6), VisualTokensConfig()) == (4, 6)
    assert kept_grid((4, 6), VisualTokensConfig(keep=0.25)) == (1, 6)
    assert kept_grid((1, 2), VisualTokensConfig(keep=0.1)) == (1, 1)


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    # Halves go up, for even and odd numbers alike; the share is the decimal that was written.
    [(3, 0.5, 2), (5, 0.5, 3), (7, 0.5, 4), (4, 0.5, 2), (50, 0.29, 15), (9, 0.25, 2), (3, 0.1, 0)],
)
def test_half_a_layer_is_rounded_up(count: int, share: float, expected: int) -> None:
    assert rounded_share(count, share) == expected
    assert num_shared(count, share) == max(1, expected)


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


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"keep": 0.0}, r"visual\.keep is a share above 0 and up to 1; it is 0\.0"),
        ({"heads": 1.5}, r"visual\.heads is a share"),
        ({"exit": -0.5}, r"visual\.exit is a share"),
        ({"ffn": 1.5}, r"visual\.ffn is a share from 0 to 1"),
        ({"keep": "half"}, r"visual\.keep is a share above 0 and up to 1; it is 'half'"),
        ({"frozen": (0.5, 0.5)}, r"visual\.frozen is a range"),
        ({"frozen": (0.5,)}, r"visual\.frozen is a range"),
        ({"frozen": 0.5}, r"visual\.frozen is a range"),
        ({"source": "reproject"}, "set ffn=0 with 'reproject'"),
        ({"source": "reproject", "ffn": 0.0, "frozen": (0.0, 1.0)}, "frozen has no effect"),
    ],
)
def test_impossible_shares_are_refused(tokens: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VisualTokensConfig(**tokens)  # type: ignore[arg-type]
