"""The command line of the planner: its outputs, its help, and mistakes in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dattn.config.cli import load_config, render_config
from tests.unit.training.test_layout_search import TINY
from tools.plan import main

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(render_config(TINY))
    return path


def test_table_json_yaml_and_picture(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"json": "a.json", "yaml": "a.yaml", "picture": "a.png"}
    outputs = [f"--{kind}={tmp_path / name}" for kind, name in files.items()]
    arguments = ["--config", str(config), "--gpus", "4", "--gpu", "h200", "--rows", "3"]
    assert main([*arguments, *outputs, "--choose", "2"]) == 0
    assert "on 4 h200" in capsys.readouterr().out
    answer = json.loads((tmp_path / "a.json").read_text())
    assert len(answer["layouts"]) == 3
    planned = load_config(config, tmp_path / "a.yaml").parallel
    chosen = answer["layouts"][1]["settings"]["parallel"]
    assert planned.tensor_model_parallel_size == chosen["tensor_model_parallel_size"]
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_settings_stand_behind_two_dashes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(config), "--gpus", "2", "4", "--"]
    assert main([*arguments, "--model.attention", "s_attn", "--global-batch-size=64"]) == 0
    said = capsys.readouterr().out
    assert said.count("attention s_attn, global batch 64") == 2


def test_a_recipe_has_a_row_per_stage_and_number(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    config.rename(recipe / "model.yaml")
    for stage in ("stage1", "stage2"):
        (recipe / f"{stage}.yaml").write_text(f"training:\n  stage: {stage}\n")
    assert main(["--recipe", str(recipe), "--gpus", "2", "4"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| stage")]
    assert [row.split(" | ")[:2] for row in rows[1:]] == [
        [f"| {stage}", number] for stage in ("stage1", "stage2") for number in ("2", "4")
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "4"], "--config"),
        (["--config", "no.yaml", "--gpus", "4"], "no.yaml"),
        (["--config", "no.yaml", "--gpus", "0"], "at least 1"),
        (["--config", "no.yaml", "--gpus", "4", "--efficiency", "7"], "share of 1"),
        (["--config", "no.yaml", "--gpus", "4", "8", "--yaml", "a.yaml"], "name one"),
        (["--recipe", "nowhere", "--gpus", "4"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_world_that_fits_no_layout_says_why(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(config), "--gpus", "7"]) == 2
    assert "no layout on 7 h100 fits" in capsys.readouterr().err


def test_help_does_not_wait_for_torch() -> None:
    command = [sys.executable, "-X", "importtime", "tools/plan.py", "--help"]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert "--gpus-per-node" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "matplotlib", "yaml"}
