"""The benchmark of the check runs, and measures nothing but what finds all that was planted."""

from pathlib import Path

import pytest

from benchmarks import bench_check_data


@pytest.mark.parametrize("records", [100, pytest.param(200_000, marks=pytest.mark.slow)])
def test_bench_check_data(tmp_path: Path, records: int) -> None:
    output = tmp_path / "check.md"
    arguments = ["--records", str(records), "--workers", "2", "--folder", str(tmp_path)]
    assert bench_check_data.main([*arguments, "--output", str(output)]) == 0
    text = output.read_text()
    assert f"{records} records" in text
    for name in ("prepare_data.py", "check_data.py", "an epoch of the loader, one process"):
        assert f"| {name} | " in text
    assert "MB at the peak" in text
    assert list(tmp_path.iterdir()) == [output]


def test_what_is_not_found_is_no_benchmark() -> None:
    with pytest.raises(RuntimeError, match="repeated ids: found 1, planted 2"):
        bench_check_data._require_equal("repeated ids", 1, 2)
