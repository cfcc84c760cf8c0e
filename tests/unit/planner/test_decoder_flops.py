"""Counted pairs against the oracle's mask, and operations against a count by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.layers import LayerRule, layer_rules
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.reference import pair_masks
from megatron_dattn.planner.decoder_flops import decoder_flops, layer_flops
from megatron_dattn.planner.layer_sizes import LayerSizes
from megatron_dattn.planner.part_flops import attended_pairs
from tests.unit.attention.support import CONFIGS, layouts


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=30, deadline=None)
@given(layout=layouts(), window=st.none() | st.integers(1, 12))
def test_pairs_are_those_of_the_oracle(name: str, layout: TokenLayout, window: int | None) -> None:
    config = CONFIGS[name]
    seen, _ = pair_masks(layout, config, window)
    if config.v2v == "diagonal":
        seen[: layout.visual_budget] = False
    visual, text = slice(0, layout.visual_budget), slice(layout.visual_budget, None)
    assert attended_pairs(layout, config, window) == {
        "V2V": int(seen[visual, visual].sum()),
        "V2T": int(seen[visual, text].sum()),
        "T2V": int(seen[text, visual].sum()),
        "T2T": int(seen[text, text].sum()),
    }


def test_concentric_pairs_of_the_published_grid() -> None:
    """(n^2 + sum of squared ring sizes) / 2 = 0.555 n^2 for 24 x 24 patches."""
    layout = TokenLayout((1,), (ImageSpan(0, 0, (24, 24)),), 576, 1)
    sizes = [92 - 8 * ring for ring in range(12)]
    assert sum(sizes) == 576
    expected = (576**2 + sum(size**2 for size in sizes)) // 2
    assert attended_pairs(layout, PRESETS["cca"])["V2V"] == expected
    assert expected / 576**2 == pytest.approx(0.555, abs=1e-3)


# d 6, q 8, e 4, f 10; 4 visual tokens before 2 text tokens.
SIZES = LayerSizes(6, 4, 2, 2, 10, 5)
LAYOUT = TokenLayout((2,), (ImageSpan(0, 0, (2, 2)),), 4, 2)


@pytest.mark.parametrize(
    ("preset", "queries", "outputs", "pairs"),
    [("s_attn", 6, 6, 21), ("dattn", 2, 6, 8 + 3), ("naavit", 2, 2, 8 + 3)],
)
def test_operations_counted_by_hand(preset: str, queries: int, outputs: int, pairs: int) -> None:
    flops = layer_flops(LAYOUT, LayerRule(PRESETS[preset]), SIZES)
    assert flops.projections == 2 * 6 * (8 * queries + 2 * 4 * 6 + 8 * outputs)
    assert flops.attention == 4 * 8 * pairs
    assert flops.ffn == 3 * 2 * 6 * 10 * 6
    assert flops.total == flops.projections + flops.attention + flops.ffn


def test_cascade_has_projections_of_its_own() -> None:
    own = layer_flops(LAYOUT, LayerRule(PRESETS["dattn_cascade"]), SIZES)
    plain = layer_flops(LAYOUT, LayerRule(PRESETS["dattn"]), SIZES)
    # Query and output of 2 text tokens (width 8), key and value of 4 visual tokens (width 4).
    assert own.projections - plain.projections == 2 * 6 * (2 * 8 * 2 + 2 * 4 * 4)
    assert (own.attention, own.ffn) == (plain.attention, plain.ffn)


def test_reprojected_tokens_pay_for_their_mlp_and_for_no_ffn() -> None:
    own = layer_flops(LAYOUT, layer_rules(PRESETS["saisa"], 2, skip_unread=False)[0], SIZES)
    plain = layer_flops(LAYOUT, LayerRule(PRESETS["naavit"]), SIZES)
    assert own.projections - plain.projections == 2 * (5 + 6) * 6 * 4
    assert own.ffn == 6 * 6 * 10 * 2


def test_frozen_and_absent_tokens_cost_what_remains() -> None:
    text_alone = TokenLayout((2,), (), 4, 2)
    full = layer_flops(LAYOUT, LayerRule(PRESETS["s_attn"]), SIZES)
    gone = layer_flops(text_alone, LayerRule(PRESETS["s_attn"]), SIZES)
    assert decoder_flops(LAYOUT, PRESETS["exit"], SIZES, 4).total == 2 * (full + gone).total
    # A frozen visual token costs its key and value; the text that follows reads them.
    frozen = gone.total + 2 * 6 * 2 * 4 * 4 + 4 * 8 * 8
    assert decoder_flops(LAYOUT, PRESETS["shortv"], SIZES, 5).total == 2 * full.total + 3 * frozen
