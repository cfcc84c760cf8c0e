"""Scores by category, as a table for people and as `scores.json` for programs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dattn.checkpoint.files import replace_synced
from megatron_dattn.evaluation.metrics import Metric
from megatron_dattn.evaluation.questions import ALL, Question
from megatron_dattn.evaluation.statistics import Estimate, PairedTest, compare, estimate

SCORES_FILE = "scores.json"


@dataclass(frozen=True)
class Scored:
    """A question, an answer, and what it is worth."""

    question: Question
    answer: str
    score: float


def score(
    questions: Sequence[Question], answers: Mapping[str, str], metric: Metric
) -> list[Scored]:
    """Every question with its score.

    Args:
        answers: by the questions' keys; one for each.
    """
    return [
        Scored(q, answers[q.key], metric.score(answers[q.key], q.answers, q.options))
        for q in questions
    ]


def by_category(scored: Sequence[Scored]) -> dict[str, list[Scored]]:
    """The questions of every category in the order of their names, and at last all of them."""
    groups: dict[str, list[Scored]] = {}
    for one in scored:
        groups.setdefault(one.question.category, []).append(one)
    named = {name: groups[name] for name in sorted(groups)} if len(groups) > 1 else {}
    return {**named, ALL: list(scored)}


def estimates(scored: Sequence[Scored], *, seed: int = 0) -> dict[str, Estimate]:
    """Mean score and interval of every category and of all."""
    return {
        name: estimate([s.score for s in group], [s.question.subject for s in group], seed=seed)
        for name, group in by_category(scored).items()
    }


def comparisons(
    ours: Sequence[Scored], theirs: Sequence[Scored], *, seed: int = 0
) -> dict[str, PairedTest]:
    """The same of the differences between two runs' answers to the same questions."""
    other = by_category(theirs)
    return {
        name: compare(
            [s.score for s in group],
            [s.score for s in other[name]],
            [s.question.subject for s in group],
            seed=seed,
        )
        for name, group in by_category(ours).items()
    }


def table(found: Mapping[str, Estimate], metric: Metric) -> str:
    """Scores in per cent, in Markdown."""
    rows = [
        [name or "(none)", str(one.questions), _percent(one.mean), _interval(one)]
        for name, one in found.items()
    ]
    return _markdown(["category", "questions", f"{metric.about} (%)", "95 % interval"], rows)


def comparison_table(found: Mapping[str, PairedTest]) -> str:
    """Differences in per cent points, in Markdown."""
    rows = [
        [
            name or "(none)",
            f"{100 * one.difference.mean:+.1f}",
            _interval(one.difference, "+.1f"),
            f"{one.p_value:.4f}",
        ]
        for name, one in found.items()
    ]
    return _markdown(["category", "difference (points)", "95 % interval", "p"], rows)


def write_scores(
    folder: Path,
    metric: Metric,
    found: Mapping[str, Estimate],
    compared: Mapping[str, PairedTest] | None = None,
) -> None:
    """Write `scores.json`: an object for every row of the table, from 0 to 1."""
    content: dict[str, dict[str, Any]] = {
        name: {
            "metric": metric.name,
            "score": one.mean,
            "interval": one.interval,
            "questions": one.questions,
        }
        for name, one in found.items()
    }
    for name, test in (compared or {}).items():
        content[name]["against"] = {
            "difference": test.difference.mean,
            "interval": test.difference.interval,
            "p_value": test.p_value,
        }
    replace_synced(folder / SCORES_FILE, json.dumps(content, indent=1).encode() + b"\n")


def _percent(value: float, form: str = ".1f") -> str:
    return format(100 * value, form)


def _interval(one: Estimate, form: str = ".1f") -> str:
    if one.interval is None:
        return "one image"
    low, high = one.interval
    return f"{_percent(low, form)} to {_percent(high, form)}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
