"""Normalising, scoring and the table."""

import json
from pathlib import Path

import pytest

from examples.quickstart.questions import (
    Question,
    format_table,
    is_correct,
    load_questions,
    normalize_answer,
    overall,
    score,
)
from megatron_dattn.errors import DataError


def question(number: int, category: str, answer: str) -> Question:
    return Question(f"q{number}", "images/a.png", category, "?", answer)


@pytest.mark.parametrize(
    ("raw", "normal"),
    [(" Top  Left. ", "top left"), ("7", "7"), ("3, 4\n", "3, 4"), ("", ""), (".", "")],
)
def test_normalize_answer(raw: str, normal: str) -> None:
    assert normalize_answer(raw) == normal


def test_exact_match_gives_no_partial_credit() -> None:
    assert is_correct(" Yes.", "yes")
    assert not is_correct("3, 4", "3, 4, 5")
    assert not is_correct("17", "7")
    assert not is_correct("", "7")


def test_score_counts_by_category_in_a_fixed_order() -> None:
    questions = [
        question(0, "where", "top left"),
        question(1, "where", "top left"),
        question(2, "where", "nowhere"),
        question(3, "digit_at", "7"),
    ]
    scores = score(questions, {"q0": "Top left", "q1": "top right", "q2": "nowhere", "q3": "1"})
    assert list(scores) == ["digit_at", "where"]
    assert (scores["where"].correct, scores["where"].total, scores["where"].blind) == (2, 3, 2)
    assert scores["digit_at"].accuracy == 0.0
    total = overall(scores)
    assert (total.correct, total.total, total.blind) == (2, 4, 3)
    assert total.accuracy == 0.5
    assert total.blind_accuracy == 0.75


def test_missing_answer_is_an_error() -> None:
    with pytest.raises(DataError, match="1 questions have no answer, the first is q1"):
        score([question(0, "where", "a"), question(1, "where", "b")], {"q0": "a"})


def test_overall_of_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="no scored questions"):
        overall({})


def test_table_is_aligned_and_ends_with_all_questions() -> None:
    scores = score(
        [question(0, "how_many", "2"), question(1, "read_all", "2")], {"q0": "2", "q1": ""}
    )
    lines = format_table(scores).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "how many digits" in lines[2]
    assert "100.0%" in lines[2]
    assert lines[-1].startswith("| all questions")
    assert "50.0%" in lines[-1]


def test_load_questions_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "heldout.json"
    row = {"id": "a", "image": "b.png", "category": "where", "question": "c", "answer": "d"}
    path.write_text(json.dumps([row]))
    assert load_questions(path) == [Question(**row)]


@pytest.mark.parametrize("text", ["", "{}", "[]", '[{"id": "a"}]', '[{"id": "a", "b": 1}]', "[1]"])
def test_files_that_hold_no_questions_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "heldout.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"heldout\.json"):
        load_questions(path)


def test_unknown_category_names_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"'colour'.*read_all"):
        question(0, "colour", "red")
