"""TokenLayout: what it refuses, what it derives, and its way between ranks."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given

from megatron_dattn.attention import ImageSpan, TokenLayout
from megatron_dattn.attention.layout import Run
from tests.unit.attention.support import RICH_LAYOUT, TEXT_ONLY_LAYOUT, layouts


def test_derived_numbers_of_a_rich_pack() -> None:
    layout = RICH_LAYOUT
    assert (layout.num_samples, layout.num_rows) == (4, 31)
    assert (layout.num_visual_rows, layout.num_text_rows) == (12, 13)
    assert layout.visual_lengths == (8, 0, 2, 2)
    assert layout.visual_cu_seqlens == (0, 8, 8, 10, 12)
    assert layout.text_cu_seqlens == (0, 5, 8, 12, 13)
    assert layout.image_rows == ((0, 4), (4, 5), (5, 8), (8, 10), (10, 12))
    assert layout.visual_rows(2) == (8, 10)
    assert layout.text_rows(2) == (15 + 8, 15 + 12)
    assert layout.sample_images(0) == (0, 1, 2)


def test_runs_follow_the_reading_order() -> None:
    assert RICH_LAYOUT.runs(0) == (
        Run(15, 17, is_visual=False),
        Run(0, 5, is_visual=True),  # two images back to back
        Run(17, 20, is_visual=False),
        Run(5, 8, is_visual=True),
    )
    assert RICH_LAYOUT.runs(1) == (Run(20, 23, is_visual=False),)
    assert RICH_LAYOUT.runs(2) == (Run(8, 10, is_visual=True), Run(23, 27, is_visual=False))


@given(layout=layouts())
def test_runs_hold_every_row_of_a_sample_once(layout: TokenLayout) -> None:
    for sample in range(layout.num_samples):
        runs = layout.runs(sample)
        rows = [row for run in runs for row in range(run.start, run.end)]
        expected = [*range(*layout.visual_rows(sample)), *range(*layout.text_rows(sample))]
        assert sorted(rows) == sorted(expected)
        kinds = [run.is_visual for run in runs]
        assert all(a != b for a, b in pairwise(kinds))


@given(layout=layouts())
def test_encode_decode_round_trip(layout: TokenLayout) -> None:
    encoded = layout.encode()
    assert encoded.dtype == torch.int64
    assert TokenLayout.decode(encoded) == layout
    in_a_larger_buffer = torch.cat((encoded, torch.full((5,), 7)))
    assert TokenLayout.decode(in_a_larger_buffer) == layout


def test_decode_refuses_a_truncated_message() -> None:
    with pytest.raises(ValueError, match="28 numbers, but only 27 arrived"):
        TokenLayout.decode(RICH_LAYOUT.encode()[:-1])


def test_layouts_are_hashable_values() -> None:
    same = TokenLayout.decode(RICH_LAYOUT.encode())
    assert same.image_rows  # a cached property does not change equality
    assert len({RICH_LAYOUT, same, TEXT_ONLY_LAYOUT}) == 2


def test_a_pack_of_padding_alone_is_a_layout() -> None:
    layout = TokenLayout((), (), visual_budget=4, text_budget=4)
    assert (layout.num_visual_rows, layout.num_text_rows, layout.num_rows) == (0, 0, 8)
    assert TokenLayout.decode(layout.encode()) == layout


@pytest.mark.parametrize(
    ("text_lengths", "images", "budgets", "message"),
    [
        ((3, 0), (), (0, 9), "sample 1 has 0 text rows"),
        ((3,), (ImageSpan(1, 0, (1, 1)),), (9, 9), "sample 1 of 1 samples"),
        ((3,), (ImageSpan(0, 4, (1, 1)),), (9, 9), "after 4 text rows, but sample 0 has 3"),
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
        ((3,), (ImageSpan(0, 0, (3, 4)),), (11, 9), "12 visual rows .* budget of 11"),
        ((3, 4), (), (0, 6), "7 text rows .* budget of 6"),
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


def test_text_that_sees_all_images_predicts_for_itself() -> None:
    rows = RICH_LAYOUT.output_rows("all")
    assert rows.tolist() == list(range(15, 31))


def test_text_before_an_image_hands_its_prediction_to_the_image() -> None:
    rows = RICH_LAYOUT.output_rows("following").tolist()
    expected = list(range(15, 31))
    expected[1] = 4  # two images follow text row 1 of sample 0: the second one's last row
    expected[4] = 7  # the image after the last text row, where no label is left to predict
    expected[12] = 11  # sample 3; the image of sample 2 stands before all text and takes nothing
    assert rows == expected
