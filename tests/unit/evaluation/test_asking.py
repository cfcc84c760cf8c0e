"""Batches are the same whatever was answered already, and keep an image's questions together."""

from collections.abc import Sequence
from itertools import pairwise

import pytest

from megatron_dattn.errors import DataError
from megatron_dattn.evaluation.asking import ask, batches, unanswered
from megatron_dattn.evaluation.questions import Question

QUESTIONS = [
    Question(number, "x" * (1 + 7 * number % 5), (f"{number % 3}.png",)) for number in range(11)
]


def test_questions_about_one_image_stand_together() -> None:
    parts = batches(QUESTIONS, 4)
    assert [len(part) for part in parts] == [4, 4, 3]
    images = [question.images for part in parts for question in part]
    assert sum(one != other for one, other in pairwise(images)) == 2
    assert {q.key for part in parts for q in part} == {q.key for q in QUESTIONS}


def test_without_shared_images_they_are_sorted_by_length() -> None:
    alone = [Question(q.id, q.text) for q in QUESTIONS]
    lengths = [len(question.text) for part in batches(alone, 4) for question in part]
    assert lengths == sorted(lengths)


def test_a_batch_with_a_missing_answer_is_asked_as_a_whole() -> None:
    parts = batches(QUESTIONS, 4)
    answered = {q.key for q in parts[0]} | {parts[1][0].key}
    assert unanswered(parts, answered) == parts[1:]
    assert unanswered(parts, {q.key for q in QUESTIONS}) == []


def test_every_answer_is_kept_round_by_round() -> None:
    parts, rounds = batches(QUESTIONS, 4), []

    def shout(questions: Sequence[Question], most: int) -> list[str]:
        return [question.text.upper()[:most] for question in questions]

    ask(parts, shout, 3, rounds.append)
    assert rounds == [[(q, q.text.upper()[:3]) for q in part] for part in parts]


def test_an_error_of_the_model_is_the_users() -> None:
    def fail(questions: Sequence[Question], most: int) -> list[str]:
        raise DataError("image 'x' is damaged")

    with pytest.raises(DataError, match="is damaged"):
        ask(batches(QUESTIONS, 4), fail, 3, lambda answered: None)
