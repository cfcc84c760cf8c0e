"""The benchmark of saves runs on its ranks, from the command line to the table."""

from pathlib import Path

from benchmarks import bench_save


def test_bench_save(tmp_path: Path) -> None:
    output = tmp_path / "save.md"
    arguments = ["--sizes", "demo", "--layouts", "dp2-distributed", "--rounds", "1"]
    assert bench_save.main([*arguments, "--folder", str(tmp_path), "--output", str(output)]) == 0
    text = output.read_text()
    assert "- demo, two ranks, distributed optimizer: " in text
    for name in bench_save.VARIANTS:
        assert f"| demo, two ranks, distributed optimizer: {name} | " in text
