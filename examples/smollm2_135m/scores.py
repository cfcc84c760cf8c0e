"""What an evaluated run is worth: the test questions by type, and what the language model kept.

Plain functions and records, without a model. Answers are right if they are the expected word; the
language model is compared with the original, whose weights it began with.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from examples.quickstart.questions import is_correct
from examples.smollm2_135m.easy_vqa import TYPES, TestQuestion
from megatron_dattn.errors import DataError


@dataclass(frozen=True)
class TypeScore:
    """Questions of one type."""

    asked: int
    correct: int
    blind: int
    """Of them would be right with the commonest answer to the same words in training."""


def choose(questions: Sequence[TestQuestion], count: int, seed: int) -> list[TestQuestion]:
    """A subset by seed, in the data set's order; all of them where count is 0."""
    if count == 0 or count >= len(questions):
        return list(questions)
    chosen = random.Random(f"questions/{seed}").sample(range(len(questions)), count)
    return [questions[number] for number in sorted(chosen)]


def by_type(questions: Sequence[TestQuestion], answers: Mapping[str, str]) -> dict[str, TypeScore]:
    """Score answers (question id -> text) in the order of TYPES, the last one over `all`.

    Raises DataError for a question without an answer, which is no wrong answer.
    """
    missing = [question.id for question in questions if question.id not in answers]
    if missing:
        raise DataError(f"{len(missing)} questions have no answer, the first is {missing[0]}")
    groups = {name: [one for one in questions if one.type == name] for name in TYPES}
    groups["all"] = list(questions)
    return {
        name: TypeScore(
            asked=len(group),
            correct=sum(is_correct(answers[one.id], one.answer) for one in group),
            blind=sum(is_correct(one.blind, one.answer) for one in group),
        )
        for name, group in groups.items()
        if group
    }


@dataclass(frozen=True)
class Agreement:
    """Greedy answers of two models to the same prompts."""

    prompts: int
    same: int
    """Equal to the last token."""
    tokens: int
    """Of the original's answers."""
    shared_tokens: int
    """Of them before the first difference."""


def agreement(original: Sequence[Sequence[int]], now: Sequence[Sequence[int]]) -> Agreement:
    """Compare token by token."""
    shared = [_shared(one, other) for one, other in zip(original, now, strict=True)]
    return Agreement(
        prompts=len(original),
        same=sum(list(one) == list(other) for one, other in zip(original, now, strict=True)),
        tokens=sum(map(len, original)),
        shared_tokens=sum(shared),
    )


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
