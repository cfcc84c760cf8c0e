"""Counted pairs against the oracle's mask, and operations against a count by hand."""

import pytest
from hypothesis import given, settings

from megatron_dattn.attention import (
    PRESETS,
    ImageSpan,
    LayerSizes,
    TokenLayout,
    attended_pairs,
    layer_flops,
)
from megatron_dattn.attention.reference import pair_masks
from tests.unit.attention.support import layouts


@pytest.mark.parametrize("preset", PRESETS)
@settings(max_examples=30, deadline=None)
@given(layout=layouts())
def test_pairs_are_those_of_the_oracle(preset: str, layout: TokenLayout) -> None:
    config = PRESETS[preset]
    seen, _ = pair_masks(layout, config)
    if config.v2v == "diagonal":
        seen[: layout.visual_budget] = False
    visual, text = slice(0, layout.visual_budget), slice(layout.visual_budget, None)
    assert attended_pairs(layout, config) == {
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


# d 6, q 8, e 4, f 10; 4 visual rows before 2 text rows.
SIZES = LayerSizes(6, 4, 2, 2, 10)
LAYOUT = TokenLayout((2,), (ImageSpan(0, 0, (2, 2)),), 4, 2)


@pytest.mark.parametrize(
    ("preset", "queries", "outputs", "pairs"),
    [("s_attn", 6, 6, 21), ("dattn", 2, 6, 8 + 3), ("naavit", 2, 2, 8 + 3)],
)
def test_operations_counted_by_hand(preset: str, queries: int, outputs: int, pairs: int) -> None:
    flops = layer_flops(LAYOUT, PRESETS[preset], SIZES)
    assert flops.projections == 2 * 6 * (8 * queries + 2 * 4 * 6 + 8 * outputs)
    assert flops.attention == 4 * 8 * pairs
    assert flops.ffn == 3 * 2 * 6 * 10 * 6
    assert flops.total == flops.projections + flops.attention + flops.ffn
