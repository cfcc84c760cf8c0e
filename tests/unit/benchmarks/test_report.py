"""Headers and tables say what a reader needs to repeat a measurement."""

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.protocol import Spread
from megatron_dattn.errors import UserError


def test_table_is_markdown() -> None:
    assert report.table(("variant", "ms"), [("dattn", "1"), ("s_attn", "2")]).splitlines() == [
        "| variant | ms |",
        "| --- | ---: |",
        "| dattn | 1 |",
        "| s_attn | 2 |",
    ]


def test_spread_gives_median_and_range() -> None:
    assert report.spread(Spread(1.314, 1.25, 1.4)) == "1.31 (1.25 to 1.40)"


def test_header_has_machine_versions_and_command() -> None:
    text = report.header("Title", "python -m it --all", torch.device("cpu"), ["a note"])
    assert text.startswith("# Title\n\n- machine: ")
    assert f"torch {version('torch')}" in text
    assert "- command: `python -m it --all`" in text
    assert text.endswith("- a note")


@pytest.mark.parametrize(
    ("ran", "asked", "words", "absent"),
    [
        (20, 20, "20 rounds", "time was up"),
        (7, 20, "(of 20: the time was up)", "no measurement"),
        (2, 2, "**fewer than 5 rounds are no measurement**", "time was up"),
    ],
)
def test_rounds_are_told(ran: int, asked: int, words: str, absent: str) -> None:
    note = report.rounds_note(ran, asked, warm_up=3)
    assert words in note
    assert absent not in note


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path, capsys) -> None:
    report.write("text", tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text() == "text\n"
    with pytest.raises(UserError, match=r"--output .*missing"):
        report.write("text", tmp_path / "missing" / "table.md")
    assert capsys.readouterr().out == "text\ntext\n"


def test_only_the_engines_device_can_be_chosen() -> None:
    chosen = report.choose_device("auto")
    other = "cpu" if chosen.type == "cuda" else "cuda"
    assert report.choose_device(chosen.type) == chosen
    with pytest.raises(UserError, match=f"--device {other}: the engine runs on {chosen.type}"):
        report.choose_device(other)
