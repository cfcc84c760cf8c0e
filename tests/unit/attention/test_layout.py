"""TokenLayout: what it refuses, what it derives, and its way between ranks."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings

from megatron_dattn.attention.layout import ImageSpan, TokenLayout, TokenRun
from tests.unit.attention.support import RICH_LAYOUT, TEXT_ONLY_LAYOUT, layouts


def test_derived_numbers_of_a_rich_pack() -> None:
    layout = RICH_LAYOUT
    assert (layout.num_samples, layout.num_tokens) == (4, 31)
    assert (layout.num_visual_tokens, layout.num_text_tokens) == (12, 13)
    assert layout.visual_lengths == (8, 0, 2, 2)
    assert layout.visual_cu_seqlens == (0, 8, 8, 10, 12)
    assert layout.text_cu_seqlens == (0, 5, 8, 12, 13)
    assert layout.image_tokens == ((0, 4), (4, 5), (5, 8), (8, 10), (10, 12))
    assert layout.visual_tokens(2) == (8, 10)
    assert layout.text_tokens(2) == (15 + 8, 15 + 12)
    assert layout.sample_images(0) == (0, 1, 2)


def test_runs_follow_the_reading_order() -> None:
    assert RICH_LAYOUT.runs(0) == (
        TokenRun(15, 17),
        TokenRun(0, 5, images=(0, 1)),  # back to back
        TokenRun(17, 20),
        TokenRun(5, 8, images=(2,)),
    )
    assert RICH_LAYOUT.runs(1) == (TokenRun(20, 23),)
    assert RICH_LAYOUT.runs(2) == (TokenRun(8, 10, images=(3,)), TokenRun(23, 27))


@settings(deadline=None)
@given(layout=layouts())
def test_runs_hold_every_token_of_a_sample_once(layout: TokenLayout) -> None:
    for sample in range(layout.num_samples):
        runs = layout.runs(sample)
        tokens = [token for run in runs for token in range(run.start, run.end)]
        expected = [*range(*layout.visual_tokens(sample)), *range(*layout.text_tokens(sample))]
        assert sorted(tokens) == sorted(expected)
        kinds = [run.is_visual for run in runs]
        assert all(a != b for a, b in pairwise(kinds))


@settings(deadline=None)
@given(layout=layouts())
def test_encode_decode_round_trip(layout: TokenLayout) -> None:
    encoded = layout.encode()
    assert encoded.dtype == torch.int64
    assert TokenLayout.decode(encoded) == layout
    in_a_larger_buffer = torch.cat((encoded, torch.full((5,), 7)))
    assert TokenLayout.decode(in_a_larger_buffer) == layout
    without_prompts = replace(layout, prompt_lengths=None)
    assert TokenLayout.decode(without_prompts.encode()) == without_prompts


def test_decode_refuses_a_truncated_message() -> None:
    with pytest.raises(ValueError, match="33 numbers, but only 32 arrived"):
        TokenLayout.decode(RICH_LAYOUT.encode()[:-1])


def test_layouts_are_hashable_values() -> None:
    same = TokenLayout.decode(RICH_LAYOUT.encode())
    assert same.image_tokens  # a cached property does not change equality
    assert len({RICH_LAYOUT, same, TEXT_ONLY_LAYOUT}) == 2


def test_a_pack_of_padding_alone_is_a_layout() -> None:
    layout = TokenLayout((), (), visual_budget=4, text_budget=4)
    assert (layout.num_visual_tokens, layout.num_text_tokens, layout.num_tokens) == (0, 0, 8)
    assert TokenLayout.decode(layout.encode()) == layout


@pytest.mark.parametrize(
    ("text_lengths", "images", "budgets", "message"),
    [
        ((3, 0), (), (0, 9), "sample 1 has 0 text tokens"),
        ((3,), (ImageSpan(1, 0, (1, 1)),), (9, 9), "sample 1 of 1 samples"),
        ((3,), (ImageSpan(0, 4, (1, 1)),), (9, 9), "after 4 text tokens, but sample 0 has 3"),
        ((3,), (ImageSpan(0, 0, (0, 2)),), (9, 9), r"empty patch grid \(0, 2\)"),
        (
            (3, 3),
            (ImageSpan(1, 0, (1, 1)), ImageSpan(0, 0, (1, 1))),
            (9, 9),
            "ordered by sample, then place",
        ),
        (
            (3,),
            (ImageSpan(0, 2, (1, 1)), ImageSpan(0, 1, (1, 1))),
            (9, 9),
            "ordered by sample, then place",
        ),
        ((3,), (ImageSpan(0, 0, (3, 4)),), (11, 9), "12 visual tokens .* budget of 11"),
        ((3, 4), (), (0, 6), "7 text tokens .* budget of 6"),
    ],
)
def test_impossible_layouts_are_refused(
    text_lengths: tuple[int, ...],
    images: tuple[ImageSpan, ...],
    budgets: tuple[int, int],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        TokenLayout(text_lengths, images, *budgets)


@pytest.mark.parametrize(
    ("prompt_lengths", "message"),
    [
        ((3,), "1 prompt lengths for 2 samples"),
        ((3, 5), "sample 1 has 5 prompt tokens, but 4 text tokens"),
        ((-1, 0), "sample 0 has -1 prompt tokens"),
    ],
)
def test_impossible_prompts_are_refused(prompt_lengths: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenLayout((3, 4), (), 0, 9, prompt_lengths)
