"""The measurement runs from its command line to the Markdown file, on sizes that take seconds."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks import bench_generation
from benchmarks.bench_generation import Times
from benchmarks.image_questions import sizes
from tests.support.vlm import VISION

NAMES = [
    "stock LLaVA",
    "exported dattn",
    "exported dattn, images kept",
    "engine s_attn",
    "engine dattn",
    "engine dattn, images kept",
    "stock LLaVA again",
]


def test_every_case_has_a_table(tmp_path: Path, monkeypatch) -> None:
    tiny = dataclasses.replace(sizes(hidden_size=64, layers=2), vision=VISION)
    monkeypatch.setattr(bench_generation, "sizes", lambda *_: tiny)
    output = tmp_path / "generation.md"
    few = ["--answer-tokens", "3", "--rounds", "1", "--output", str(output)]
    assert bench_generation.main(["--cases", "1x2", "2x1", *few]) == 0
    text = output.read_text()
    assert "## 1 question(s) of 18 visual tokens" in text
    assert "## 2 question(s) of 9 visual tokens" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[0] not in ("variant", "---")]
    assert [row[0] for row in rows] == 2 * NAMES
    assert all(float(cell.split()[0]) > 0 for row in rows for cell in row[1:])
    assert rows[0][2] == "1.00 (1.00 to 1.00)"


def test_a_step_is_the_median_after_the_first_token() -> None:
    assert Times.of(lambda: [1.0, 5.0, 6.0, 9.0, 10.0]) == Times(first=4.0, step=1.0)


@pytest.mark.parametrize("case", ["8", "0x1", "8xa"])
def test_a_wrong_case_is_one_line(case: str, capsys) -> None:
    assert bench_generation.main(["--cases", case]) == 2
    assert f"--cases {case}: write questions x images" in capsys.readouterr().err
