"""The split of the handwriting: whole forms, disjoint, complete."""

import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from examples.quickstart.digits import (
    FORM_STARTS,
    NUM_DIGITS,
    SPLIT_FORMS,
    load_bank,
    split_indices,
)


def test_splits_are_disjoint_and_complete() -> None:
    places = [place for split in SPLIT_FORMS for place in split_indices(split)]
    assert sorted(places) == list(range(NUM_DIGITS))


def test_no_bitmap_is_in_two_splits() -> None:
    bitmaps = {
        split: {hashlib.sha256(image.tobytes()).digest() for image in load_bank(split).images}
        for split in SPLIT_FORMS
    }
    assert not bitmaps["train"] & bitmaps["heldout"]
    assert not bitmaps["train"] & bitmaps["validation"]
    assert not bitmaps["validation"] & bitmaps["heldout"]


def test_forms_begin_where_the_file_counts_from_zero() -> None:
    """Every form starts with a run 0..9 (one lacks its 0), and no run ends just before a form."""
    targets = load_digits().target
    for start in FORM_STARTS:
        first = int(targets[start])
        assert first in (0, 1)
        assert np.array_equal(targets[start : start + 10], np.arange(first, first + 10) % 10)
        assert start == 0 or not np.array_equal(targets[start - 3 : start], [7, 8, 9])


def test_every_form_holds_the_same_sequence() -> None:
    """What the split rests on: after three runs of 0..9 every form goes on alike."""
    targets = "".join(map(str, load_digits().target))
    for start, end in zip(FORM_STARTS, (*FORM_STARTS[1:], NUM_DIGITS), strict=True):
        form = targets[start:end]
        assert 120 <= len(form) <= 130
        assert form.count("095565098984177351") == 1
        assert form.index("095565098984177351") in range(27, 31)


def test_bank_agrees_with_the_file() -> None:
    bank = load_bank("heldout")
    digits = load_digits()
    assert bank.images.dtype == np.uint8
    assert bank.images.max() == 255
    assert np.array_equal(bank.labels, digits.target[bank.indices])
    for label, rows in enumerate(bank.rows_by_label):
        assert len(rows) > 10
        assert set(bank.labels[list(rows)]) == {label}


def test_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="train, validation, heldout"):
        split_indices("test")
