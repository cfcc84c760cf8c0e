"""The benchmark of the host's time runs for every preset."""

from pathlib import Path

from benchmarks import bench_host
from megatron_dattn.attention import PRESETS


def test_bench_host(tmp_path: Path) -> None:
    output = tmp_path / "host.md"
    sizes = ["--images", "2", "--grid", "3", "4", "--layers", "4", "--rounds", "1"]
    assert bench_host.main([*sizes, "--window", "5", "--output", str(output)]) == 0
    text = output.read_text()
    assert "2 images of 12 patches" in text
    for preset in PRESETS:
        assert f"| {preset} | " in text
