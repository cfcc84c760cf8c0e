"""Intervals and tests against what is known of them."""

import numpy as np
import pytest

from megatron_dattn.evaluation import statistics
from megatron_dattn.evaluation.statistics import compare, estimate


def test_an_interval_is_as_wide_as_the_normal_one() -> None:
    scores = [1.0] * 300 + [0.0] * 100
    found = estimate(scores, range(400))
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert found.mean == 0.75
    assert found.interval is not None
    assert found.interval == pytest.approx((0.75 - half, 0.75 + half), abs=0.006)


def test_questions_about_one_image_count_as_one() -> None:
    """Ten copies of every question tell nothing new."""
    scores = [1.0] * 30 + [0.0] * 10
    once = estimate(scores, range(40))
    repeated = estimate(np.repeat(scores, 10).tolist(), np.repeat(range(40), 10).tolist())
    assert repeated.interval == pytest.approx(once.interval)
    assert repeated.questions == 400


def test_the_same_seed_gives_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(1).random(50).tolist()
    assert estimate(scores, range(50)) == estimate(scores, range(50))
    assert estimate(scores, range(50), seed=1) != estimate(scores, range(50))
    whole = estimate(scores, range(50))
    monkeypatch.setattr(statistics, "_NUMBERS_AT_ONCE", 700)  # in blocks
    assert estimate(scores, range(50)) == whole


def test_one_image_has_no_interval() -> None:
    assert estimate([1.0, 0.0], ["one", "one"]).interval is None


def test_a_clear_difference_is_not_chance_and_no_difference_is() -> None:
    better = compare([1.0] * 20, [0.0] * 20, range(20))
    assert better.difference.mean == 1
    assert better.p_value < 0.001
    same = compare([1.0, 0.0] * 10, [1.0, 0.0] * 10, range(20))
    assert same.p_value == 1
    assert same.difference.interval == (0, 0)


def test_the_test_is_the_sign_test_for_right_and_wrong() -> None:
    """8 of 10 images that differ speak for one run: 2 * P(at least 8 of 10) = 0.109."""
    ours, theirs = [1.0] * 8 + [0.0] * 2, [0.0] * 8 + [1.0] * 2
    assert compare(ours, theirs, range(10)).p_value == pytest.approx(0.109, abs=0.015)
