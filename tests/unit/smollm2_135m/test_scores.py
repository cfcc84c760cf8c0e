"""Scores by type, beside an answer that never looks; agreement of two models' answers."""

import pytest

from examples.smollm2_135m.easy_vqa import TestQuestion as Asked
from examples.smollm2_135m.scores import Agreement, TypeScore, agreement, by_type, choose
from megatron_dattn.errors import DataError


def _question(number: int, kind: str, answer: str, blind: str) -> Asked:
    return Asked(str(number), "0.png", "?", answer, kind, blind)


QUESTIONS = [
    _question(0, "has_color", "yes", "no"),
    _question(1, "shape", "circle", "circle"),
    _question(2, "has_color", "no", "no"),
]


def test_each_type_and_all_are_scored() -> None:
    scores = by_type(QUESTIONS, {"0": "Yes.", "1": "triangle", "2": "no"})
    assert list(scores) == ["shape", "has_color", "all"]
    assert scores["shape"] == TypeScore(asked=1, correct=0, blind=1)
    assert scores["has_color"] == TypeScore(asked=2, correct=2, blind=1)
    assert scores["all"] == TypeScore(asked=3, correct=2, blind=2)


def test_a_missing_answer_is_no_wrong_answer() -> None:
    with pytest.raises(DataError, match="1 questions have no answer, the first is 2"):
        by_type(QUESTIONS, {"0": "yes", "1": "circle"})


def test_a_subset_is_the_seeds_and_in_order() -> None:
    many = [_question(number, "shape", "circle", "circle") for number in range(100)]
    chosen = choose(many, 10, seed=0)
    assert chosen == choose(many, 10, seed=0) != choose(many, 10, seed=1)
    assert [int(one.id) for one in chosen] == sorted({int(one.id) for one in chosen})
    assert len(chosen) == 10
    assert choose(many, 0, seed=0) == choose(many, 1000, seed=0) == many


def test_answers_agree_up_to_their_first_difference() -> None:
    original = [[1, 2, 3], [4, 5], [6], [7, 8]]
    now = [[1, 2, 3], [4, 9, 5], [6, 7], [9, 8]]
    assert agreement(original, now) == Agreement(prompts=4, same=1, tokens=8, shared_tokens=5)
