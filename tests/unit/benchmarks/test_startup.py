"""The benchmark of the start runs on its two ranks; its tokenizer is as large as asked for."""

from pathlib import Path

from benchmarks import bench_startup


def test_bench_startup(tmp_path: Path) -> None:
    output = tmp_path / "startup.md"
    sizes = ["--vocabulary", "400", "--records", "4", "--rounds", "1"]
    assert bench_startup.main([*sizes, "--output", str(output)]) == 0
    text = output.read_text()
    assert "growth by the comparison" in text
    assert "2 processes over gloo" in text
    for name in bench_startup.VARIANTS:
        assert f"| {name} | " in text


def test_the_tokenizer_is_as_large_as_asked_for() -> None:
    assert len(bench_startup.make_tokenizer(400)) == 404
