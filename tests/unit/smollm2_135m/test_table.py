"""The table has a column for each preset that ran, and says how many seeds stand behind it."""

import json
from pathlib import Path
from typing import Any

import pytest

from examples.smollm2_135m.table import read_scores, table


def _scores(correct: int, after: float) -> dict[str, Any]:
    one = {"asked": 10, "correct": correct, "blind": 3}
    return {
        "attention": "dattn",
        "precision": "bf16",
        "steps": {"adapter": 5, "everything": 7},
        "questions": {"asked": 10, "of": 100, "seed": 0},
        "accuracy": {"shape": one, "all": one},
        "text": "some text",
        "perplexity": {"before": 20.0, "after": after},
        "agreement": {"prompts": 100, "same": 25, "tokens": 400, "shared_tokens": 300},
    }


def _write(folder: Path, preset: str, seed: int, scores: dict[str, Any]) -> None:
    run = folder / preset / f"seed{seed}"
    run.mkdir(parents=True)
    (run / "scores.json").write_text(json.dumps(scores))


@pytest.fixture
def lines(tmp_path: Path) -> dict[str, list[str]]:
    _write(tmp_path, "dattn", 1, _scores(8, 21.0))
    _write(tmp_path, "dattn", 2, _scores(9, 23.0))
    _write(tmp_path, "s_attn", 1, _scores(5, 30.0))
    (tmp_path / "dattn" / "seed3").mkdir()  # not evaluated yet
    rows = [line for line in table(read_scores(tmp_path)).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {row[0]: row[1:] for row in cells}


def test_presets_are_columns(lines: dict[str, list[str]]) -> None:
    header = lines["accuracy on test questions, %"]
    assert header == ["`s_attn`", "`dattn`", "without looking"]
    assert lines["which shape (10)"] == ["50.0", "85.0 ± 5.0", "30.0"]
    assert lines["perplexity after"] == ["30.00", "22.00 ± 1.00", ""]
    assert lines["answers to 100 prompts unchanged, %"][0] == "25.0"
    assert lines["their tokens before the first change, %"][0] == "75.0"


def test_seeds_are_named(lines: dict[str, list[str]]) -> None:
    assert lines["seeds"] == ["1", "1, 2", ""]


def test_a_subset_is_said(tmp_path: Path) -> None:
    _write(tmp_path, "dattn", 1, _scores(8, 21.0))
    text = table(read_scores(tmp_path))
    assert "10 of 100 test questions, drawn with seed 0" in text
    assert "steps: adapter 5, everything 7; bf16" in text
