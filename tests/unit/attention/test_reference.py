"""The oracle itself: against hand-written masks and against two independent formulations."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.layers import output_tokens
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.positions import apply_rotary, rotary_tables, token_positions
from megatron_dattn.attention.reference import pair_masks
from tests.unit.attention.support import (
    HEAD_DIM,
    RICH_LAYOUT,
    SCALE,
    TEXT_ONLY_LAYOUT,
    VARIANTS,
    layouts,
    make_problem,
    run_oracle,
)

# One sample, read as: text a, image (v w), text b c, image x, text d. Then a token of padding each,
# and a second sample of one text token e. Packed: v w x - | a b c d e -.
LAYOUT = TokenLayout(
    (4, 1),
    (ImageSpan(0, 1, (1, 2)), ImageSpan(0, 3, (1, 1))),
    visual_budget=4,
    text_budget=6,
    prompt_lengths=(2, 0),  # a b
)
TOKENS = "vwx-abcde-"

# Which keys each query token sees.
SEES = {
    "s_attn": {
        "v": "av", "w": "avw", "x": "avwbcx",
        "a": "a", "b": "avwb", "c": "avwbc", "d": "avwbcxd", "e": "e",
    },
    "dattn": {
        "v": "v", "w": "w", "x": "x",
        "a": "vwxa", "b": "vwxab", "c": "vwxabc", "d": "vwxabcd", "e": "e",
    },
    "ee_mllm": {
        "v": "v", "w": "w", "x": "x",
        "a": "a", "b": "avwb", "c": "avwbc", "d": "avwbcxd", "e": "e",
    },
}  # fmt: skip
SEES["s_attn_debias"] = SEES["s_attn"]
for name in ("dattn_biased", "dattn_sum", "dattn_tanh", "dattn_sigmoid", "vidi"):
    SEES[name] = SEES["dattn"]
SEES["naavit"] = SEES["ee_mllm"] | {"v": "", "w": "", "x": ""}
SEES["aki"] = SEES["s_attn"] | {"v": "avb", "w": "avwb"}
SEES["yopo"] = SEES["s_attn"] | {"v": "avw", "x": "axbc"}  # its own image alone
SEES["cca"] = SEES["s_attn"] | {"v": "avw"}  # a grid of 1 x 2 is one ring


@pytest.mark.parametrize("preset", SEES)
def test_each_token_sees_what_the_preset_says(preset: str) -> None:
    seen, _ = pair_masks(LAYOUT, PRESETS[preset])
    actual = {
        token: {TOKENS[k] for k in range(len(TOKENS)) if seen[q, k]}
        for q, token in enumerate(TOKENS)
    }
    expected = {token: set(SEES[preset].get(token, "")) for token in TOKENS}
    assert actual == expected


def test_a_patch_sees_the_square_around_it() -> None:
    layout = TokenLayout((1,), (ImageSpan(0, 0, (4, 7)),), 28, 1)
    seen, _ = pair_masks(layout, PRESETS["yopo"])
    corner = {i * 7 + j for i in range(3) for j in range(3)}
    inside = {i * 7 + j for i in range(4) for j in range(1, 6)}
    assert set(seen[0].nonzero().flatten().tolist()) == corner
    assert set(seen[1 * 7 + 3].nonzero().flatten().tolist()) == inside


def test_a_window_slides_over_the_tokens_of_its_own_part() -> None:
    """Over reading order in S-Attn, so that images fall out of it; over text alone in D-Attn."""
    d = TOKENS.index("d")  # read last, after a v w b c x
    expected = {"s_attn": {*"cxd"}, "dattn": {*"vwx", *"bcd"}, "s_attn_debias": {*"vwx", *"bcd"}}
    for preset, keys in expected.items():
        seen, _ = pair_masks(LAYOUT, PRESETS[preset], window=3)
        assert {TOKENS[key] for key in seen[d].nonzero().flatten().tolist()} == keys


def test_an_inherited_window_counts_the_text_behind_an_image() -> None:
    """Read as a v w b c x d: from the first image to d three text tokens, from the second one."""
    for window, images in ((4, "vwx"), (3, "x"), (2, "x"), (1, "")):
        seen, _ = pair_masks(LAYOUT, VARIANTS["inherit"], window)
        keys = {TOKENS[key] for key in seen[TOKENS.index("d")].nonzero().flatten().tolist()}
        assert {key for key in keys if key in "vwx"} == set(images)
        # Text before an image sees it whatever the window: scope is "all".
        assert seen[TOKENS.index("a"), :3].tolist() == [True] * 3


def test_a_frozen_layer_s_window_counts_images_as_its_preset_s_does() -> None:
    d = TOKENS.index("d")  # read last, after a v w b c x
    for window, expected in ((3, "cxd"), (4, "bcxd"), (5, "wbcxd"), (7, "avwbcxd")):
        for config in (PRESETS["s_attn"], VARIANTS["frozen"]):
            seen, _ = pair_masks(LAYOUT, config, window)
            assert {TOKENS[key] for key in seen[d].nonzero().flatten().tolist()} == set(expected)


def test_a_concentric_image_is_seen_from_the_border_inwards() -> None:
    layout = TokenLayout((2,), (ImageSpan(0, 1, (3, 4)), ImageSpan(0, 1, (1, 1))), 13, 2)
    seen, _ = pair_masks(layout, PRESETS["cca"])
    centre, first_text = {5, 6}, {13}
    border = set(range(12)) - centre
    for token in range(12):
        expected = border | first_text | (centre if token in centre else set())
        assert set(seen[token].nonzero().flatten().tolist()) == expected
    assert seen[12].tolist() == [True] * 14 + [False]  # a later image sees the whole earlier one


@pytest.mark.parametrize("preset", PRESETS)
@settings(max_examples=30, deadline=None)
@given(layout=layouts())
def test_no_label_and_no_later_image_reaches_a_prediction(preset: str, layout: TokenLayout) -> None:
    """Through however many layers: `reaches` is the transitive closure of the mask.

    Every text token from the last one of the prompt on is labelled with the token after it.
    """
    config = PRESETS[preset]
    seen, _ = pair_masks(layout, config)
    reaches = seen | torch.eye(layout.num_tokens, dtype=torch.bool)
    while not torch.equal(wider := (reaches.float() @ reaches.float()) > 0, reaches):
        reaches = wider
    predicting = output_tokens(layout, config).tolist()
    prompts = layout.prompt_lengths
    assert prompts is not None
    for sample in range(layout.num_samples):
        start, end = layout.text_tokens(sample)
        others = [
            token for token in range(layout.num_tokens) if not _of_sample(token, sample, layout)
        ]
        first = start + max(prompts[sample] - 1, 0) if config.v2t == "prompt" else start
        for text in range(first, end):
            token = predicting[text - layout.visual_budget]
            assert not reaches[token, text + 1 : end].any()
            assert not reaches[token, others].any()
            if config.t2v.scope == "following" and config.v2t != "prompt":
                later = [
                    image_record
                    for index in layout.sample_images(sample)
                    if layout.images[index].text_offset > text - start
                    for image_record in range(*layout.image_tokens[index])
                ]
                assert not reaches[text, later].any()


def test_a_prompt_does_come_back_through_the_image() -> None:
    """Why labels must not stand in it; and the check above would notice."""
    seen, _ = pair_masks(LAYOUT, PRESETS["aki"])
    a, b = TOKENS.index("a"), TOKENS.index("b")
    image = TOKENS.index("v")
    assert seen[image, b]
    assert seen[b, image]
    assert not seen[a, b]


def _of_sample(token: int, sample: int, layout: TokenLayout) -> bool:
    ranges = (layout.visual_tokens(sample), layout.text_tokens(sample))
    return any(start <= token < end for start, end in ranges)


@pytest.mark.parametrize("preset", SEES)
def test_only_text_to_visual_pairs_are_ever_unrotated(preset: str) -> None:
    config = PRESETS[preset]
    seen, rotated = pair_masks(LAYOUT, config)
    unrotated_pairs = {(TOKENS[q], TOKENS[k]) for q, k in (seen & ~rotated).nonzero().tolist()}
    text_to_visual = {(q, k) for q in "abcde" for k in SEES[preset][q] if k in "vwx"}
    assert unrotated_pairs == (set() if config.t2v.rotary else text_to_visual)


def test_s_attn_is_causal_attention_in_reading_order() -> None:
    config = PRESETS["s_attn"]
    problem = make_problem(LAYOUT, config, group=1)
    order = [TOKENS.index(token) for token in "avwbcxd"]
    rotary = rotary_tables(torch.arange(len(order)), HEAD_DIM, base=100.0)
    query, key = (apply_rotary(x[order], rotary) for x in (problem.query, problem.key))
    expected = F.scaled_dot_product_attention(
        query.transpose(0, 1),
        key.transpose(0, 1),
        problem.value[order].transpose(0, 1),
        is_causal=True,
        scale=SCALE,
    ).transpose(0, 1)
    out = run_oracle(problem, LAYOUT, config)[0]
    torch.testing.assert_close(out[order], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("preset", ["dattn", "s_attn_debias"])
@pytest.mark.parametrize("layout", [RICH_LAYOUT, TEXT_ONLY_LAYOUT], ids=["rich", "text-only"])
def test_debiasing_is_one_softmax_over_doubled_heads(preset: str, layout: TokenLayout) -> None:
    """Queries [rotated | plain] against text keys [rotated | 0] and visual keys [0 | plain]."""
    config = PRESETS[preset]
    problem = make_problem(layout, config, group=1)
    rotary = rotary_tables(token_positions(layout, config), HEAD_DIM, base=100.0)
    query, key, value = (x.transpose(0, 1) for x in problem.inputs)
    rotated_query, rotated_key = (
        apply_rotary(x, rotary).transpose(0, 1) for x in (problem.query, problem.key)
    )
    text = slice(layout.visual_budget, layout.num_tokens)
    keys = torch.zeros(*key.shape[:2], 2 * HEAD_DIM, dtype=key.dtype)
    keys[:, text, :HEAD_DIM] = rotated_key[:, text]
    keys[:, : layout.visual_budget, HEAD_DIM:] = key[:, : layout.visual_budget]
    seen, _ = pair_masks(layout, config)
    has_keys = seen.any(-1)
    out = F.scaled_dot_product_attention(
        torch.cat((rotated_query, query), dim=-1)[:, text],
        keys,
        torch.cat((value, torch.zeros_like(value)), dim=-1),
        attn_mask=(seen | ~has_keys[:, None])[text],
        scale=SCALE,
    )[..., :HEAD_DIM].transpose(0, 1)
    valid = has_keys[text]
    expected = run_oracle(problem, layout, config)[0][text]
    torch.testing.assert_close(out[valid], expected[valid], atol=1e-12, rtol=0)
    assert torch.equal(expected[~valid], torch.zeros_like(expected[~valid]))


def test_diagonal_tokens_output_their_own_value() -> None:
    config = PRESETS["dattn"]
    problem = make_problem(LAYOUT, config, group=2)
    out = run_oracle(problem, LAYOUT, config)[0]
    expected = problem.value[:4].repeat_interleave(2, dim=1)
    assert torch.equal(out[:4], expected)
