"""What an answer is worth, from 0 to 1, by the rules of the benchmarks' public scorers.

Every function takes an answer and those that people gave. None of them asks a model: the same
answers always get the same scores.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_dattn.errors import ConfigError, nearest_name
from megatron_dattn.evaluation.choices import chosen_letter, plain, right_letter
from megatron_dattn.evaluation.vqa_words import normalised

_RELATIVE_ERROR = 0.05
_LEAST_SIMILARITY = 0.5
_ROUGE_BETA = 1.2
_AGREEING_PEOPLE = 3
_WORD = re.compile(r"[^\W_]+")


def exact(answer: str, expected: Sequence[str], options: Mapping[str, str]) -> float:
    """1 for any of the right answers, but for case, white space and a full stop at the end."""
    return float(any(plain(answer) == plain(right) for right in expected))


def relaxed(answer: str, expected: Sequence[str], options: Mapping[str, str]) -> float:
    """1 for a number within 5 % of the right one, or the same text: ChartQA's relaxed accuracy.

    "25%" is 0.25. Of a right answer of 0 nothing is a percentage, so it must be the same text.
    Source: section 5.1 of https://arxiv.org/abs/2203.10244, as pix2struct's scorer computes it.
    """
    return float(any(_is_near(answer.strip(), right.strip()) for right in expected))


def vqa(answer: str, expected: Sequence[str], options: Mapping[str, str]) -> float:
    """VQA accuracy: min(1, others who say so / 3), averaged over leaving out each person once.

    The public evaluator leaves answers as they are where all ten are equal, and expects that the
    model's came through its normalisation already; here both always go through it.
    Source: https://visualqa.org/evaluation.html.
    """
    ours, people = normalised(answer), [normalised(person) for person in expected]
    agreeing = sum(person == ours for person in people)
    credits = [min(1.0, (agreeing - (person == ours)) / _AGREEING_PEOPLE) for person in people]
    return sum(credits) / len(credits)


def anls(answer: str, expected: Sequence[str], options: Mapping[str, str]) -> float:
    """Similarity to the nearest right answer, 0 below one half: DocVQA's, for a single question.

    Source: https://rrc.cvc.uab.es/?ch=17&com=tasks; lengths are those before white space is made
    even, as its scorer has them.
    """
    best = max(_similarity(answer, right) for right in expected)
    return best if best >= _LEAST_SIMILARITY else 0.0


def choice(answer: str, expected: Sequence[str], options: Mapping[str, str]) -> float:
    """1 where the answer means the right option's letter."""
    letter = chosen_letter(answer, options)
    return float(letter is not None and letter in [right_letter(r, options) for r in expected])


def caption(answer: str, expected: Sequence[str], options: Mapping[str, str]) -> float:
    """ROUGE-L: longest common subsequence of words, best precision with best recall, beta 1.2.

    Source: https://aclanthology.org/W04-1013, over several captions as coco-caption computes it;
    words are runs of letters and digits, where that has the Penn Treebank's.
    """
    said = _words(answer)
    references = [words for right in expected if (words := _words(right))]
    if not said or not references:
        return 0.0
    common = [(_common(said, words), len(words)) for words in references]
    precision = max(shared for shared, _ in common) / len(said)
    recall = max(shared / length for shared, length in common)
    if precision == 0:
        return 0.0
    beta = _ROUGE_BETA**2
    return (1 + beta) * precision * recall / (recall + beta * precision)


@dataclass(frozen=True)
class Metric:
    """A way to score one answer."""

    name: str
    about: str
    score: Callable[[str, Sequence[str], Mapping[str, str]], float]
    """Answer, right answers, options by letter."""
    least_answers: int = 1
    """Of people, for a score of 1 to be possible."""


METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact", "exact match", exact),
        Metric("relaxed", "relaxed accuracy", relaxed),
        Metric("vqa", "VQA accuracy", vqa, _AGREEING_PEOPLE + 1),
        Metric("anls", "ANLS", anls),
        Metric("choice", "accuracy of the chosen letter", choice),
        Metric("caption", "ROUGE-L", caption),
    )
}


def metric_of(name: str) -> Metric:
    """The metric of that name. Raises ConfigError if there is none."""
    if name not in METRICS:
        nearest = nearest_name(name, METRICS)
        remedy = f"; the nearest is {nearest}" if nearest else ""
        raise ConfigError(f"there is no metric '{name}', only {', '.join(METRICS)}{remedy}")
    return METRICS[name]


def _is_near(answer: str, right: str) -> bool:
    ours, theirs = _number(answer), _number(right)
    if ours is not None and theirs:
        return abs(ours - theirs) / abs(theirs) <= _RELATIVE_ERROR
    return answer.lower() == right.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _similarity(answer: str, right: str) -> float:
    length = max(len(answer), len(right))
    if length == 0:
        return 1.0
    ours, theirs = (" ".join(text.lower().split()) for text in (answer, right))
    return 1 - edit_distance(ours, theirs) / length


def edit_distance(first: str, second: str) -> int:
    """The fewest characters to insert, delete or replace until both are equal (Levenshtein's)."""
    row = list(range(len(second) + 1))
    for number, one in enumerate(first, 1):
        diagonal, row[0] = row[0], number
        for place, other in enumerate(second, 1):
            cost = min(diagonal + (one != other), row[place] + 1, row[place - 1] + 1)
            diagonal, row[place] = row[place], cost
    return row[-1]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for one in first:
        diagonal = 0
        for place, other in enumerate(second, 1):
            longest = diagonal + 1 if one == other else max(row[place], row[place - 1])
            diagonal, row[place] = row[place], longest
    return row[-1]
