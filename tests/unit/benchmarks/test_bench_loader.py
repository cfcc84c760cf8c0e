"""The loader's benchmark runs from its command line to the Markdown file, on sizes of seconds."""

from pathlib import Path

from benchmarks import bench_loader


def test_bench_loader(tmp_path: Path) -> None:
    output = tmp_path / "loader.md"
    few = ["--packs", "1", "--rounds", "1", "--samples", "400", "--records", "50", "--steps", "0"]
    assert bench_loader.main([*few, "--output", str(output)]) == 0
    text = output.read_text()
    for part in (bench_loader._OURS, bench_loader._PLAIN, "64 ranks, now", "50 records"):
        assert f"| {part} |" in text, part
