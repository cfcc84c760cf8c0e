"""Both scripts run from their command line to the Markdown file, on sizes that take seconds."""

import re
from pathlib import Path

import pytest

from benchmarks import bench_attention, bench_step
from benchmarks.step_variants import distance

FEW = ["--samples", "2", "--rounds", "1"]
TINY = ["--hidden-size", "32", "--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--ffn", "48"]


def table_rows(text: str) -> list[list[str]]:
    """Cells of all rows of all tables, headers and rules left out."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [row for row in cells if row[0] not in ("variant", "---")]


def test_bench_attention(tmp_path: Path, capsys) -> None:
    output = tmp_path / "attention.md"
    sizes = ["--visual", "12", "20", "--text", "16", "--dtype", "fp32", *TINY]
    variants = ["dattn", "dattn:naive", "s_attn", "s_attn:eager"]
    arguments = [*sizes, "--variants", *variants, "--rounds", "2", "--output", str(output)]
    assert bench_attention.main(arguments) == 0
    text = output.read_text()
    assert text == capsys.readouterr().out
    assert "2 rounds" in text
    assert "**fewer than 5 rounds are no measurement**" in text
    expected = [[name, visual] for visual in ("12", "20") for name in variants]
    rows = table_rows(text)
    assert [row[:2] for row in rows] == expected + expected  # times, then errors
    assert all(row[2] == "float64" for row in rows[len(expected) :])


def test_bench_attention_says_where_the_time_goes(capsys) -> None:
    sizes = ["--visual", "12", "--text", "16", *TINY, "--rounds", "1", "--threads", "1"]
    assert bench_attention.main([*sizes, "--variants", "dattn", "s_attn", "--cpu-time"]) == 0
    times, profile, ratios, errors = (
        table_rows(part) for part in re.split(r"\n\n(?=\|)", capsys.readouterr().out)[1:]
    )
    assert [row[0] for row in profile] == [row[0] for row in times] == ["dattn", "s_attn"]
    for row in profile:  # every kind has a forward and a backward pass
        assert all(len(list(map(float, cell.split(" + ")))) == 2 for cell in row[2:7]), row
    assert [row[0] for row in ratios] == ["s_attn"]
    assert len(errors) == 2


def test_bench_step(tmp_path: Path) -> None:
    output = tmp_path / "step.md"
    arguments = ["--attention", "s_attn", "dattn", "--samples", "2", "--rounds", "1"]
    assert bench_step.main([*arguments, "--recompute", "full", "--output", str(output)]) == 0
    text = output.read_text()
    names = [row[0] for row in table_rows(text)]
    engines = ["engine s_attn", "engine dattn"]
    assert names == [*engines, "plain PyTorch", *engines]  # times, then bounds
    for name in engines:
        assert f"first losses of {name}: " in text
    assert "first losses of plain PyTorch: from engine dattn's at most" in text


def test_losses_that_differ_are_no_benchmark() -> None:
    assert distance([2.0, 1.00005], [2.0, 1.0], "fp32", "a and b") == pytest.approx(5e-5)
    assert distance([2.0, 1.01], [2.0, 1.0], "bf16", "a and b") == pytest.approx(1e-2)
    with pytest.raises(RuntimeError, match="a and b: the first losses are"):
        distance([2.0, 1.01], [2.0, 1.0], "fp32", "a and b")


def test_every_preset_has_a_pack_of_its_own(capsys) -> None:
    """fastervlm keeps four of the demo's sixteen patches, s_attn all of them."""
    arguments = ["--attention", "s_attn", "fastervlm", "--precision", "bf16", *FEW]
    assert bench_step.main(arguments) == 0
    rows = {row[0]: row for row in table_rows(capsys.readouterr().out)[:2]}
    assert rows["engine s_attn"][1] == "32"
    assert rows["engine fastervlm"][1] == "8"
    assert rows["engine s_attn"][2] == rows["engine fastervlm"][2]


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (bench_attention.main, ["--variants", "attn"], "unknown attention preset 'attn'"),
        (bench_attention.main, ["--visual", "0", *TINY], "0 visual"),
        (bench_attention.main, ["--variants", "saisa", *TINY], "variant 'saisa' carries features"),
        (bench_attention.main, ["--threads", "0"], "--threads must be at least 1, got 0"),
        (bench_attention.main, ["--cpu-time", "--threads", "2"], "--cpu-time is of the host"),
        (bench_step.main, ["--threads", "-1"], "--threads must be at least 1, got -1"),
        (bench_step.main, ["--attention", "attn"], "model.attention 'attn' is unknown"),
    ],
)
def test_errors_are_one_line(main, arguments: list[str], words: str, capsys) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
