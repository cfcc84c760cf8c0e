"""The benchmark of the imports runs."""

from pathlib import Path

import pytest

from benchmarks import bench_imports


def test_bench_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_imports, "STARTS", dict.fromkeys(bench_imports.STARTS, "pass"))
    output = tmp_path / "imports.md"
    assert bench_imports.main(["--rounds", "1", "--output", str(output)]) == 0
    for name in bench_imports.STARTS:
        assert f"| {name} | " in output.read_text()
