"""The layer's operators against `attention`'s own count, and against counts by hand."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.roofline import (
    NAIVE,
    LayerRun,
    Machine,
    Operator,
    Work,
    bound_seconds,
    layer_operators,
    total_work,
)
from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.layers import LayerRule, layer_rules
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.models.config import LanguageConfig, ModelConfig, VisionConfig
from megatron_dattn.models.execution import ExactSavings
from megatron_dattn.planner.decoder_flops import decoder_flops, layer_flops
from megatron_dattn.planner.flops import model_flops
from megatron_dattn.planner.layer_sizes import LayerSizes
from tests.unit.attention.support import layouts

# d 6, q 8, e 4, f 10; 4 visual tokens and 2 text tokens, 1 of them before the image.
SIZES = LayerSizes(6, 4, 2, 2, 10, 5)
LAYOUT = TokenLayout((2,), (ImageSpan(0, 1, (2, 2)),), 4, 2, prompt_lengths=(2,))
BF16 = 2


def run_of(preset: str, **changes: object) -> LayerRun:
    return replace(LayerRun(LAYOUT, LayerRule(PRESETS[preset]), SIZES, BF16), **changes)


def forward(run: LayerRun) -> Work:
    return sum((operator.forward for operator in layer_operators(run)), Work())


def operator_of(run: LayerRun, name: str) -> Operator:
    (found,) = (operator for operator in layer_operators(run) if operator.name == name)
    return found


@pytest.mark.parametrize("preset", PRESETS)
@settings(max_examples=20, deadline=None)
@given(layout=layouts(), layer=st.integers(0, 3), skip_unread=st.booleans())
def test_forward_operations_are_those_of_the_attention_room(
    preset: str, layout: TokenLayout, layer: int, skip_unread: bool
) -> None:
    """It counts visual queries where they are needed and the output weight at its full width."""
    rule = layer_rules(PRESETS[preset], 4, skip_unread=skip_unread)[layer]
    run = LayerRun(layout, rule, SIZES, BF16, ExactSavings(folded_output=False))
    assert forward(run).flops == layer_flops(layout, rule, SIZES).total


@pytest.mark.parametrize("preset", PRESETS)
def test_all_three_counts_of_a_decoder_agree(preset: str) -> None:
    """Bounds, MFU and the drawing's cost speak of the same operations."""
    language = LanguageConfig(
        hidden_size=6,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=2,
        intermediate_size=10,
    )
    vision = VisionConfig(hidden_size=5, num_attention_heads=1)
    model = ModelConfig(vision, language=language)
    rules = layer_rules(PRESETS[preset], language.num_hidden_layers, skip_unread=False)
    whole = ExactSavings(folded_output=False)
    bounds = sum(forward(LayerRun(LAYOUT, rule, SIZES, BF16, whole)).flops for rule in rules)
    parts = model_flops(model, [LAYOUT], attention=preset).parts
    mfu = sum(parts[name].forward for name in ("projections", "attention", "ffn"))
    assert bounds == mfu == decoder_flops(LAYOUT, PRESETS[preset], SIZES, len(rules)).total


def test_savings_leave_out_what_they_say() -> None:
    """Per visual token a query, and what its repeated values cost the output projection."""
    naive, exact = forward(run_of("dattn", savings=NAIVE)), forward(run_of("dattn"))
    assert naive.flops - exact.flops == 2 * 6 * 4 * 8 + 2 * 6 * 4 * (8 - 4)


def test_savings_change_nothing_where_visual_tokens_attend() -> None:
    assert layer_operators(run_of("s_attn", savings=NAIVE)) == layer_operators(run_of("s_attn"))


def test_product_counted_by_hand() -> None:
    """Down projection of 6 tokens, 10 to 6 values: x, W and y are moved; twice that backward."""
    down = operator_of(run_of("dattn"), "down")
    assert down.forward == Work(2 * 6 * 10 * 6, 2 * (6 * 10 + 10 * 6 + 6 * 6))
    assert down.backward == down.forward + down.forward


def test_flash_attention_counted_by_hand() -> None:
    """s_attn: 21 pairs of 6 tokens, one part. dattn: 8 + 3 pairs, T2V 2 x 4 tokens and T2T 2 x
    2."""
    attention = operator_of(run_of("s_attn"), "attention")
    lse = 4 * 4 * 6
    assert attention.forward == Work(4 * 8 * 21, 2 * (2 * 6 * 8 + 2 * 6 * 4) + lse)
    assert attention.backward == Work(10 * 8 * 21, 2 * (4 * 6 * 8 + 4 * 6 * 4) + lse)
    attention = operator_of(run_of("dattn"), "attention")
    lse = 4 * 4 * (2 + 2)
    assert attention.forward == Work(4 * 8 * 11, 2 * (2 * 4 * 8 + 2 * 6 * 4) + lse)
    assert operator_of(run_of("dattn"), "merge").forward.bytes == 2 * 3 * 2 * 8
    assert operator_of(run_of("s_attn"), "merge").forward.bytes == 0


def test_eager_attention_moves_24_bytes_per_score_in_bf16() -> None:
    """QK^T writes 2; scale and mask read and write 4 each; softmax reads 2 and writes 4, its cast
    reads 4 and writes 2; the product with the values reads 2. All 6 x 6 pairs of 4 heads."""
    run = run_of("s_attn", eager=True)
    names = ("scores", "scale and mask", "softmax", "values")
    steps = [operator_of(run, name) for name in names]
    work = sum((step.forward for step in steps), Work())
    mask, states = 2 * 36, 2 * 2 * (2 * 6 * 8)
    assert work == Work(4 * 8 * 36, 24 * 4 * 36 + mask + states)
    assert sum(step.backward.flops for step in steps) == 8 * 8 * 36


def test_recomputation_adds_a_forward_pass() -> None:
    once, again = run_of("dattn"), run_of("dattn", recompute=True)
    extra = forward(once)
    assert total_work(layer_operators(again)) == total_work(layer_operators(once)) + extra
    chunked = run_of("dattn", savings=ExactSavings(ffn_chunk_tokens=2))
    repeated = {operator.name for operator in layer_operators(chunked) if operator.recomputed}
    assert repeated == {"norm 2", "gate and up", "SwiGLU", "down", "residual 2"}


def test_bound_is_the_slower_of_computing_and_moving() -> None:
    operators = (
        Operator("product", Work(1000, 10), Work(2000, 20)),
        Operator("norm", Work(0, 50), Work(0, 100)),
    )
    assert bound_seconds(operators, Machine(100, 10)) == 10 + 20 + 5 + 10
    assert bound_seconds(operators, Machine(1e12, 10)) == pytest.approx(1 + 2 + 5 + 10)
    repeated = (replace(operators[0], recomputed=True), operators[1])
    assert bound_seconds(repeated, Machine(100, 10)) == 10 + 10 + 20 + 5 + 10


def test_the_promise_grows_with_the_image() -> None:
    """Mistral-7B's layer on 989 TFLOP/s and 3.35 TB/s: D-Attn's gain over flash S-Attn is small
    for one photograph and several-fold for a film; eager attention loses more than flash."""
    machine, gains = Machine(989e12, 3.35e12), []
    for side in (24, 96, 272):
        image = ImageSpan(0, 32, (side, side))
        layout = TokenLayout((256,), (image,), side**2, 256)
        bounds = {
            (preset, eager): bound_seconds(
                layer_operators(
                    LayerRun(layout, LayerRule(PRESETS[preset]), LayerSizes(), BF16, eager=eager)
                ),
                machine,
            )
            for preset, eager in (("dattn", False), ("s_attn", False), ("s_attn", True))
        }
        gains.append(bounds["s_attn", False] / bounds["dattn", False])
        assert bounds["s_attn", True] > bounds["s_attn", False]
    assert 1.0 < gains[0] < 1.2
    assert 1.2 < gains[1] < 1.5
    assert 2.5 < gains[2] < 3.2
