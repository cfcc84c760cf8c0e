"""The evaluation's pure part: questions, comparing answers, the accuracy table.

No model and no picture here: whoever generates answers calls `score` with them and prints
`format_table`. An answer counts when it equals the expected one word by word after normalisation
(case, surrounding space, a final full stop); there is no partial credit.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dattn.errors import DataError

CATEGORY_TITLES = {
    "digit_at": "which digit is at a place",
    "where": "where is a digit",
    "how_many": "how many digits",
    "is_there": "is a digit there",
    "left_right": "is one left / right of another",
    "read_all": "read all digits in order",
}


@dataclass(frozen=True)
class Question:
    """A held-out question; `image` is relative to the data folder."""

    id: str
    image: str
    category: str
    question: str
    answer: str

    def __post_init__(self) -> None:
        if self.category not in CATEGORY_TITLES:
            raise DataError(
                f"question {self.id} has the category {self.category!r}; "
                f"known ones are {', '.join(CATEGORY_TITLES)}"
            )


@dataclass(frozen=True)
class CategoryScore:
    """Result of one category.

    blind is the number a model that never looks would get right: the commonest expected answer of
    the category, given every time.
    """

    total: int
    correct: int
    blind: int

    @property
    def accuracy(self) -> float:
        """Share of exact matches, 0..1."""
        return self.correct / self.total

    @property
    def blind_accuracy(self) -> float:
        """Share reached without looking, 0..1."""
        return self.blind / self.total


def load_questions(path: Path) -> list[Question]:
    """Read heldout.json.

    Raises DataError for a file that is not a non-empty list of questions.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        questions = [Question(**row) for row in rows]
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise DataError(f"{path} is not a file of held-out questions: {error}") from error
    if not questions:
        raise DataError(f"{path} holds no question")
    return questions


def normalize_answer(answer: str) -> str:
    """Lower case, single spaces, no final full stop."""
    return " ".join(answer.lower().split()).rstrip(".").rstrip()


def is_correct(answer: str, expected: str) -> bool:
    """Exact match after normalisation."""
    return normalize_answer(answer) == normalize_answer(expected)


def score(questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, CategoryScore]:
    """Score answers (question id -> generated text) by category, in the order of CATEGORY_TITLES.

    Every question must have its answer: a missing one is an error, not a wrong answer.
    """
    missing = [question.id for question in questions if question.id not in answers]
    if missing:
        raise DataError(f"{len(missing)} questions have no answer, the first is {missing[0]}")
    scores = {}
    for category in CATEGORY_TITLES:
        asked = [question for question in questions if question.category == category]
        if not asked:
            continue
        correct = sum(is_correct(answers[question.id], question.answer) for question in asked)
        commonest = Counter(normalize_answer(question.answer) for question in asked).most_common(1)
        scores[category] = CategoryScore(total=len(asked), correct=correct, blind=commonest[0][1])
    return scores


def overall(scores: Mapping[str, CategoryScore]) -> CategoryScore:
    """All questions together."""
    if not scores:
        raise DataError("there are no scored questions")
    return CategoryScore(
        total=sum(one.total for one in scores.values()),
        correct=sum(one.correct for one in scores.values()),
        blind=sum(one.blind for one in scores.values()),
    )


def format_table(scores: Mapping[str, CategoryScore]) -> str:
    """The accuracy table as Markdown, the last row over all questions."""
    rows = [(CATEGORY_TITLES[category], one) for category, one in scores.items()]
    rows.append(("all questions", overall(scores)))
    width = max(len(title) for title, _ in rows)
    lines = [
        f"| {'category':<{width}} | correct | asked | accuracy | without looking |",
        f"| {'-' * width} | ------: | ----: | -------: | --------------: |",
    ]
    lines += [
        f"| {title:<{width}} | {one.correct:>7} | {one.total:>5} | {one.accuracy:>8.1%} "
        f"| {one.blind_accuracy:>15.1%} |"
        for title, one in rows
    ]
    return "\n".join(lines)
