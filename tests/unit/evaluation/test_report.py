"""Tables and scores.json."""

import json
from pathlib import Path

from megatron_dattn.evaluation.metrics import METRICS
from megatron_dattn.evaluation.questions import Question
from megatron_dattn.evaluation.report import (
    by_category,
    comparison_table,
    comparisons,
    estimates,
    score,
    table,
    write_scores,
)

QUESTIONS = [
    Question(number, "x", answers=("yes",), category="b" if number < 3 else "a")
    for number in range(4)
]
ANSWERS = {"0": "yes", "1": "no", "2": "yes", "3": "Yes."}
EXACT = METRICS["exact"]


def test_the_table_has_a_row_for_each_category_and_one_for_all() -> None:
    scored = score(QUESTIONS, ANSWERS, EXACT)
    assert [one.score for one in scored] == [1, 0, 1, 1]
    lines = table(estimates(scored), EXACT).splitlines()
    assert lines[0] == "| category | questions | exact match (%) | 95 % interval |"
    assert lines[2] == "| a | 1 | 100.0 | one image |"
    assert lines[3].startswith("| b | 3 | 66.7 | 0.0 to ")
    assert lines[4].startswith("| all | 4 | 75.0 | ")


def test_one_category_is_all() -> None:
    assert list(by_category(score(QUESTIONS[:3], ANSWERS, EXACT))) == ["all"]


def test_scores_and_a_comparison_are_written(tmp_path: Path) -> None:
    ours = score(QUESTIONS, ANSWERS, EXACT)
    theirs = score(QUESTIONS, dict.fromkeys(ANSWERS, "no"), EXACT)
    compared = comparisons(ours, theirs)
    assert comparison_table(compared).splitlines()[-1].startswith("| all | +75.0 | +25.0 to ")
    write_scores(tmp_path, EXACT, estimates(ours), compared)
    content = json.loads((tmp_path / "scores.json").read_text())
    assert list(content) == ["a", "b", "all"]
    assert content["all"]["score"] == content["all"]["against"]["difference"] == 0.75
    assert content["a"]["interval"] is None
    assert (content["b"]["metric"], content["b"]["questions"]) == ("exact", 3)
