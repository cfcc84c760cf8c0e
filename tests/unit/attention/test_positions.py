"""Rotary ids of packed tokens, and the rotation against its definition by complex numbers."""

import math

import pytest
import torch
from hypothesis import given, settings

from megatron_dattn.attention import PRESETS, AttentionConfig
from megatron_dattn.attention.config import Positions, TextToVisual
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.positions import (
    RotaryScaling,
    apply_rotary,
    rotary_tables,
    token_positions,
)
from megatron_dattn.attention.reference import described_positions
from tests.unit.attention.support import CONFIGS, layouts

OTHER_POSITIONS = {
    "gap_alone": AttentionConfig(positions=Positions(text="gap")),
    "ring_of_diagonal": AttentionConfig(
        t2v=TextToVisual(rotary=True), positions=Positions("gap", "ring", "none")
    ),
}

# Sample 0: text text IMAGE(2) text IMAGE(1); sample 1: IMAGE(2) text text.
LAYOUT = TokenLayout(
    (3, 2),
    (ImageSpan(0, 2, (1, 2)), ImageSpan(0, 3, (1, 1)), ImageSpan(1, 0, (2, 1))),
    visual_budget=6,
    text_budget=7,
)


@pytest.mark.parametrize("preset", ["s_attn", "dattn_biased", "ee_mllm", "aki"])
def test_sequence_positions_count_all_tokens_in_reading_order(preset: str) -> None:
    positions = token_positions(LAYOUT, PRESETS[preset]).tolist()
    assert positions == [2, 3, 5, 0, 1, 0, 0, 1, 4, 2, 3, 0, 0]


def test_text_only_positions_leave_images_out() -> None:
    positions = token_positions(LAYOUT, PRESETS["dattn"]).tolist()
    assert positions == [0] * 6 + [0, 1, 2, 0, 1, 0, 0]


def test_rings_count_from_the_border_and_text_goes_on_after_the_centre() -> None:
    # Text, images of 4 x 3 and of 1 x 2 (a single ring), text.
    images = (ImageSpan(0, 1, (4, 3)), ImageSpan(0, 1, (1, 2)))
    layout = TokenLayout((3,), images, visual_budget=15, text_budget=4)
    positions = token_positions(layout, PRESETS["cca"]).tolist()
    assert positions[:12] == [1, 1, 1, 1, 2, 1, 1, 2, 1, 1, 1, 1]
    assert positions[12:] == [3, 3, 0, 0, 4, 5, 0]


@pytest.mark.parametrize("name", [*CONFIGS, "gap_alone", "ring_of_diagonal"])
@settings(max_examples=50, deadline=None)
@given(layout=layouts())
def test_positions_are_those_of_the_oracle(name: str, layout: TokenLayout) -> None:
    config = (CONFIGS | OTHER_POSITIONS)[name]
    assert token_positions(layout, config).tolist() == described_positions(layout, config)


def test_the_oracle_s_positions_of_a_layout_by_hand() -> None:
    # Read as: text text IMAGE(2) text IMAGE(1); in rings, the image of 1 x 2 is a single one.
    assert described_positions(LAYOUT, PRESETS["s_attn"])[:9] == [2, 3, 5, 0, 1, 0, 0, 1, 4]
    assert described_positions(LAYOUT, PRESETS["cca"])[:9] == [2, 2, 4, 0, 0, 0, 0, 1, 3]
    assert described_positions(LAYOUT, PRESETS["dattn"])[:9] == [0, 0, 0, 0, 0, 0, 0, 1, 2]


@settings(deadline=None)
@given(layout=layouts())
def test_sequence_positions_number_each_sample_without_gaps(layout: TokenLayout) -> None:
    positions = token_positions(layout, PRESETS["s_attn"])
    for sample in range(layout.num_samples):
        tokens = [*range(*layout.visual_tokens(sample)), *range(*layout.text_tokens(sample))]
        assert sorted(positions[tokens].tolist()) == list(range(len(tokens)))


def test_rotation_turns_channel_pairs_by_position_times_frequency() -> None:
    positions = torch.tensor([0, 1, 7, 300])
    states = torch.randn(4, 3, 8, dtype=torch.float64)
    rotated = apply_rotary(states, rotary_tables(positions, 8, base=10_000.0))
    pairs = torch.complex(states[..., :4], states[..., 4:])
    frequencies = 10_000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    angles = positions[:, None, None] * frequencies
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    # Angles are float32: 300 * 6e-8 relative error of an angle, twice.
    torch.testing.assert_close(rotated, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(rotated[0], states[0], atol=0, rtol=0)


def test_rotated_scores_depend_on_distances_alone() -> None:
    query, key = torch.randn(2, 1, 1, 16, dtype=torch.float64)

    def score(query_position: int, key_position: int) -> torch.Tensor:
        q, k = (
            apply_rotary(tokens, rotary_tables(torch.tensor([position]), 16, base=100.0))
            for tokens, position in ((query, query_position), (key, key_position))
        )
        return (q * k).sum()

    # Float32 angles of up to 23 rad carry errors near 1e-6.
    torch.testing.assert_close(score(9, 4), score(23, 18), atol=1e-4, rtol=0)
    assert (score(9, 4) - score(9, 5)).abs() > 1e-3


def test_opposite_angles_undo_the_rotation() -> None:
    cos, sin = rotary_tables(torch.arange(5), 8, base=100.0)
    states = torch.randn(5, 2, 8, dtype=torch.float64)
    restored = apply_rotary(apply_rotary(states, (cos, sin)), (cos, -sin))
    # cos^2 + sin^2 = 1 within float32 rounding of the tables.
    torch.testing.assert_close(restored, states, atol=1e-6, rtol=0)


def test_tables_are_float32_and_states_keep_their_dtype() -> None:
    rotary = rotary_tables(torch.arange(3), 4, base=100.0)
    assert {table.dtype for table in rotary} == {torch.float32}
    assert apply_rotary(torch.randn(3, 1, 4).bfloat16(), rotary).dtype == torch.bfloat16


def test_odd_head_dims_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="head_dim 7 is odd"):
        rotary_tables(torch.arange(3), 7, base=100.0)


def test_scaling_slows_down_what_turns_rarely_and_leaves_the_rest():
    """Against the rule in words, pair by pair, with a factor that is no power of two."""
    scaling = RotaryScaling(
        factor=6.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=100
    )
    plain = 0.5 ** torch.arange(12, dtype=torch.float32)
    for before, after in zip(plain.tolist(), scaling.scale(plain).tolist(), strict=True):
        turns = 100 * before / (2 * math.pi)
        if turns >= 4:
            assert after == before
        elif turns <= 1:
            assert after == pytest.approx(before / 6)
        else:
            kept = (turns - 1) / 3
            assert after == pytest.approx(kept * before + (1 - kept) * before / 6)
    assert {turns > 4 for turns in (100 * plain / (2 * math.pi)).tolist()} == {True, False}
    unscaled = rotary_tables(torch.arange(9), 8, base=50.0)
    scaled = rotary_tables(torch.arange(9), 8, base=50.0, scaling=scaling)
    assert torch.equal(unscaled[0][0], scaled[0][0]), "position 0 stays the identity"
    assert not torch.equal(unscaled[1], scaled[1])
