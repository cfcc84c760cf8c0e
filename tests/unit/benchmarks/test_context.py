"""The context-parallel benchmark: its rows, and a run of two ranks over few tokens."""

from pathlib import Path

from benchmarks import bench_context
from megatron_dattn.parallel.context.exchange import bytes_per_layer


def test_a_row_compares_what_was_sent_with_the_formula_and_a_ring() -> None:
    sizes = bench_context.TEXT, bench_context.HEADS, bench_context.HEAD_DIM
    formula = sum(bytes_per_layer(*sizes, 4))
    row = bench_context.traffic_row(4, 16384, 4 * bench_context.LAYERS * formula)
    assert row[:2] == ["4", "16384"]
    assert row[2] == row[3]
    assert row[4] == "1.0000"
    assert float(row[5]) > 10 * float(row[2]), "a ring carries keys and values of all tokens"


def test_bytes_by_hand() -> None:
    # Two ranks, three text tokens, two heads of four channels: log-sum-exps to one other rank,
    # outputs, and queries' gradients, each of which a ring of two sends once.
    assert bytes_per_layer(3, 2, 4, ranks=2) == (3 * 2 * 4 + 3 * 2 * 4 * 4, 3 * 2 * 4 * 4)
    assert bytes_per_layer(3, 2, 4, ranks=1) == (0, 0)


def test_a_step_of_two_ranks(tmp_path: Path) -> None:
    output = tmp_path / "memory.md"
    arguments = ["--memory", "--ranks", "2", "--visual", "512", "--output", str(output)]
    assert bench_context.main(arguments) == 0
    (row,) = [line for line in output.read_text().splitlines() if line.startswith("| 512 |")]
    assert float(row.split("|")[4]) > 0  # the loss
