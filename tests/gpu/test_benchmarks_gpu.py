"""The benchmark of one layer on a CUDA device: events, peak memory, BF16 against float64."""

from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_bench_attention_tells_errors_and_peaks(tmp_path: Path) -> None:
    from benchmarks import bench_attention
    from tests.unit.benchmarks.test_scripts import table_rows

    output = tmp_path / "attention.md"
    sizes = ["--visual", "576", "--hidden-size", "256", "--heads", "4", "--kv-heads", "2"]
    sizes += ["--head-dim", "64", "--ffn", "512", "--dtype", "bf16", "--rounds", "2"]
    assert bench_attention.main([*sizes, "--output", str(output)]) == 0
    text = output.read_text()
    assert "peak GB" in text
    rows = table_rows(text)
    times, errors = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert all(float(row[-1]) > 0 for row in times)
    # BF16 keeps 8 bits: a layer's outputs and gradients are right to about one percent.
    assert all(float(error) < 0.03 for row in errors for error in row[3:])
