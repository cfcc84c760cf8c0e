"""The ablation's table counts finished runs, and says how far seeds lie apart."""

import json
from pathlib import Path

from examples.quickstart.ablation import table


def _finished(output: Path, attention: str, seed: int, where: float, whole: float) -> None:
    folder = output / attention / f"seed{seed}"
    folder.mkdir(parents=True)
    scores = {"where": {"accuracy": where}, "all": {"accuracy": whole}}
    (folder / "accuracy.json").write_text(json.dumps(scores))


def test_mean_and_spread_of_finished_runs(tmp_path: Path) -> None:
    _finished(tmp_path, "dattn", 1, 0.5, 0.8)
    _finished(tmp_path, "dattn", 2, 0.7, 0.9)
    _finished(tmp_path, "s_attn", 1, 0.25, 0.5)
    (tmp_path / "s_attn" / "seed2").mkdir()  # begun
    lines = table(tmp_path).splitlines()
    assert lines[0] == "| attention | seeds | where | all |"
    assert lines[2:] == [
        "| `dattn` | 2 | 60.0 ± 10.0 | 85.0 ± 5.0 |",
        "| `s_attn` | 1 | 25.0 ± 0.0 | 50.0 ± 0.0 |",
    ]


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    assert table(tmp_path) == "no finished run"
