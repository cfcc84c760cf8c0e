"""Variants are read, layouts are square, and every variant computes what its preset means."""

import signal
import subprocess
from dataclasses import replace

import pytest
import torch

from benchmarks.agreement import Outcome, agree, compare, local_name, relative_error
from benchmarks.decoder_layer import Bench, LayerBench, Variant, fits, one_sample, rules_of
from benchmarks.exact_attention import SCORES_AT_A_TIME, ExactBackend
from benchmarks.layer_memory import fit_line, peak_in_new_process, peak_table
from benchmarks.roofline import Work, layer_operators
from megatron_dattn.attention import PRESETS, get_preset
from megatron_dattn.attention.backends.base import ScoreFunction
from megatron_dattn.attention.backends.select import BACKENDS
from megatron_dattn.attention.plan.parts import plan_attention
from megatron_dattn.errors import ConfigError, UserError
from megatron_dattn.planner.decoder_flops import layer_flops
from megatron_dattn.planner.layer_sizes import LayerSizes

SIZES = LayerSizes(32, 4, 4, 8, 48, 24)  # four key heads: yopo masks one of them
BENCH = Bench(SIZES, torch.device("cuda" if torch.cuda.is_available() else "cpu"), "fp32")
LAYOUT = one_sample(12, 40)
OPTIONS = ("naive", "recompute", "chunk=8")
VARIANTS = [
    *PRESETS,
    *(f"{preset}:{option}" for preset in ("dattn", "yopo") for option in OPTIONS),
    "s_attn:eager",
    "dattn:backend=math",
]


def test_variant_options() -> None:
    variant = Variant.parse("dattn:naive:recompute:chunk=64")
    assert (variant.preset, variant.eager, variant.recompute) == ("dattn", False, True)
    assert not variant.savings.visual_queries
    assert not variant.savings.folded_output
    assert variant.savings.ffn_chunk_tokens == 64
    plain = Variant.parse("dattn").savings
    assert plain.visual_queries
    assert plain.folded_output
    # The layer stands for one in the middle of a decoder, whose visual tokens are read.
    assert not plain.unread_tokens


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dattn:fast", "unknown option 'fast'"),
        ("dattn:chunk=", "unknown option 'chunk='"),
        ("dattn:eager", "for s_attn alone"),
        ("exit:eager", "variant 'exit:eager': eager attention is written for s_attn alone"),
        ("fastervlm:eager", "for s_attn alone"),
        ("s_attn:eager:backend=math", "has no backend"),
        ("dattn:backend=fast", "backend=NAME with auto, flash_attn3"),
        ("attn", "unknown attention preset"),
    ],
)
def test_wrong_variants_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Variant.parse(text)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_layer_that_is_built_is_the_one_that_is_counted(preset: str) -> None:
    """Its visual tokens do what the preset's do, and the next layer reads them."""
    layer, following, *_ = rules_of(preset)
    assert layer.sees_images
    assert following.sees_images
    assert layer.visual_ffn == get_preset(preset).visual.ffn
    variant = Variant.parse(preset)
    unfolded = replace(variant, savings=replace(variant.savings, folded_output=False))
    operators = layer_operators(BENCH.run_of(unfolded, LAYOUT))
    counted = sum((operator.forward for operator in operators), Work())
    assert counted.flops == layer_flops(LAYOUT, layer, SIZES).total


def test_features_must_fit_into_the_tokens() -> None:
    narrow = replace(BENCH, sizes=replace(SIZES, vision_hidden_size=33))
    narrow.check([Variant.parse("dattn"), Variant.parse("naavit")])
    with pytest.raises(ConfigError, match="--vision-size 33 in tokens of --hidden-size 32"):
        narrow.check([Variant.parse("dattn"), Variant.parse("saisa")])


@pytest.mark.parametrize(
    ("visual", "grid"), [(576, (24, 24)), (4608, (64, 72)), (65536, (256, 256)), (7, (1, 7))]
)
def test_images_are_as_square_as_they_can_be(visual: int, grid: tuple[int, int]) -> None:
    layout = one_sample(visual, 256)
    assert layout.images[0].grid == grid
    assert layout.images[0].text_offset == 32
    assert layout.num_tokens == layout.num_visual_tokens + layout.num_text_tokens


def test_eager_attention_that_does_not_fit_is_left_out() -> None:
    notes: list[str] = []
    assert fits(BENCH, Variant.parse("s_attn"), 10**7, notes)
    assert fits(BENCH, Variant.parse("s_attn:eager"), 100, notes)
    assert notes == []
    assert not fits(BENCH, Variant.parse("s_attn:eager"), 10**7, notes)
    assert "s_attn:eager over 10000000 tokens left out" in notes[0]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("scores", [SCORES_AT_A_TIME, 256])
def test_variants_agree_with_float64(scores: int, monkeypatch) -> None:
    """fp32 has 24 bits; a layer adds up hundreds of products, in another order than float64."""
    monkeypatch.setattr("benchmarks.exact_attention.SCORES_AT_A_TIME", scores)
    layers = {name: LayerBench(BENCH, Variant.parse(name), LAYOUT) for name in VARIANTS}
    for name, found in agree(layers).items():
        assert found.against == "float64"
        errors = (found.output, found.input_gradient, found.weight_gradient)
        assert min(errors) > 0, name
        assert max(errors) < 1e-5, name


@pytest.mark.parametrize("scores", [SCORES_AT_A_TIME, 100])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_reference_is_the_math_backend_in_blocks(
    preset: str, window: int | None, scores: int, monkeypatch
) -> None:
    monkeypatch.setattr("benchmarks.exact_attention.SCORES_AT_A_TIME", scores)
    plan = plan_attention(LAYOUT, get_preset(preset), window=window)
    generator = torch.Generator().manual_seed(0)
    for part in (*plan.parts, *plan.visual_parts):
        queries, keys = part.query_tokens.length, part.key_tokens.length
        q, g = torch.randn(2, queries, 4, 8, generator=generator, dtype=torch.float64)
        k, v = torch.randn(2, keys, 2, 8, generator=generator, dtype=torch.float64)
        exact, known, function = ExactBackend(), BACKENDS["math"], ScoreFunction(0.3)
        out, lse = known.forward(q, k, v, part, function)
        gradients = exact.backward(g, q, k, v, out, lse, part, function)
        actual = (*exact.forward(q, k, v, part, function), *gradients)
        expected = (out, lse, *known.backward(g, q, k, v, out, lse, part, function))
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("one_process")
def test_a_variant_may_name_its_backend() -> None:
    named = LayerBench(BENCH, Variant.parse("dattn:backend=math"), LAYOUT)
    common = LayerBench(BENCH, Variant.parse("dattn"), LAYOUT)
    assert named.attention.layer(1).backend.name == "math"
    assert common.attention.layer(1).backend.name != "math"


@pytest.mark.usefixtures("one_process")
def test_a_wrong_attention_is_noticed() -> None:
    """The check would be worthless if the layer's other parts drowned the attention."""
    right = LayerBench(BENCH, Variant.parse("s_attn:eager"), LAYOUT)
    wrong = LayerBench(BENCH, Variant.parse("s_attn:eager"), LAYOUT)
    wrong.model.decoder.layers[0].self_attention.core_attention.scale *= 1.1
    found = compare(Outcome.of(wrong), Outcome.of(right), LAYOUT, "itself")
    assert min(found.output, found.input_gradient, found.weight_gradient) > 1e-3


def test_fused_norms_have_the_local_names() -> None:
    layer = "decoder.layers.0."
    names = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
        "self_attention.linear_qkv.weight": "self_attention.linear_qkv.weight",
        "input_layernorm.weight": "input_layernorm.weight",
    }
    assert {name: local_name(layer + name) for name in names} == {
        name: layer + local for name, local in names.items()
    }


def test_relative_error() -> None:
    ones = torch.ones(4)
    assert relative_error(1.5 * ones, ones) == pytest.approx(0.5)
    assert relative_error(0 * ones, 0 * ones) == 0.0


def test_a_straight_line_is_found_and_a_parabola_is_not() -> None:
    line = fit_line({tokens: 500 + 7 * tokens for tokens in (10, 20, 40)})
    assert line is not None
    assert (line.per_token, line.constant) == pytest.approx((7, 500))
    assert line.deviation == pytest.approx(0, abs=1e-12)
    parabola = fit_line({tokens: tokens**2 for tokens in (10, 20, 40)})
    assert parabola is not None
    assert parabola.deviation > 0.1
    assert fit_line({10: 1, 20: 2}) is None


def test_memory_table_leaves_unknown_peaks_empty() -> None:
    peaks = {"dattn": {10: 10**7, 20: 2 * 10**7, 40: 4 * 10**7}, "s_attn:eager": {10: 10**8}}
    rows = peak_table(peaks, [10, 20, 40]).splitlines()[2:]
    assert rows == [
        "| dattn | 10 | 20 | 40 | 1000.00 | 0.0 % |",
        "| s_attn:eager | 100 |  |  |  |  |",
    ]


def test_a_process_that_ran_out_of_memory_is_one_line(monkeypatch) -> None:
    killed = subprocess.CompletedProcess([], -signal.SIGKILL, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: killed)
    with pytest.raises(
        UserError, match="dattn at 64 tokens was killed, most likely for want of mem"
    ):
        peak_in_new_process(BENCH, "dattn", 64, 16)


@pytest.mark.slow
def test_memory_of_a_new_process_holds_the_activations() -> None:
    """The gated FFN alone keeps 3 x 48 values of each of 4096 tokens."""
    assert peak_in_new_process(BENCH, "dattn", 4096, 16) > 4096 * 3 * 48 * 4
