"""The handwritten digits that ship inside scikit-learn, split by filled-in form, never by digit.

scikit-learn's 1797 digits are the test part of the UCI "Optical Recognition of Handwritten Digits"
data. Its documentation says that 13 people wrote this part; it gives no writer per digit. The file
itself shows its order: the same sequence of about 130 digits occurs 14 times in a row, so it is a
stack of 14 forms. A form is surely one person's; 14 forms of 13 people mean that at most a few
forms share their writer, and nobody can tell which. We therefore keep whole forms together and take
contiguous runs of them: no digit and no form is ever in two splits.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

FORM_STARTS = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667)
NUM_DIGITS = 1797
# The last forms in file order are held out: a rule that does not look at their handwriting.
SPLIT_FORMS = {"train": range(10), "validation": range(10, 11), "heldout": range(11, 14)}


@dataclass(frozen=True)
class DigitBank:
    """The digits of one split.

    images: uint8 [n, 8, 8], ink 0..255; labels: int64 [n]; indices: int64 [n], place in the file.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray

    @cached_property
    def rows_by_label(self) -> tuple[tuple[int, ...], ...]:
        """For each digit 0..9 the rows of this bank that show it."""
        return tuple(tuple(np.flatnonzero(self.labels == label).tolist()) for label in range(10))


def split_indices(split: str) -> range:
    """Places in scikit-learn's file that belong to a split; they are contiguous."""
    if split not in SPLIT_FORMS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLIT_FORMS)}")
    forms = SPLIT_FORMS[split]
    ends = (*FORM_STARTS[1:], NUM_DIGITS)
    return range(FORM_STARTS[forms[0]], ends[forms[-1]])


@cache
def load_bank(split: str) -> DigitBank:
    """The digits of a split, read from the installed scikit-learn package."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    if len(digits.target) != NUM_DIGITS:
        raise ValueError(
            f"scikit-learn's digits have {len(digits.target)} rows, {NUM_DIGITS} were expected: "
            "the split by forms does not apply to another file"
        )
    indices = np.asarray(split_indices(split), dtype=np.int64)
    ink = np.clip(digits.images[indices] * (255.0 / 16.0), 0, 255).astype(np.uint8)
    return DigitBank(images=ink, labels=digits.target[indices].astype(np.int64), indices=indices)
