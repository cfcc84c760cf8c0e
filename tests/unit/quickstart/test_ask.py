"""Asking an export: the right answers pass, another one is told and ends with status 1."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from examples.quickstart.ask import pick
from examples.quickstart.demo import ROOT
from megatron_dattn.conversion.hf_export.run import ExportOptions, export_checkpoint
from megatron_dattn.inference import Prompt, generate, load_model
from megatron_dattn.runtime.distributed import destroy_distributed
from tests.support.run_folders import make_run_folder
from tests.unit.conversion.hf_models import save_language, save_vision


@pytest.fixture(scope="module")
def model_and_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with an export, and one with questions and the training stack's answers."""
    base = tmp_path_factory.mktemp("ask")
    save_vision(base / "vision")
    save_language(base / "language")
    make_run_folder(base, base / "run", "dattn")
    export_checkpoint(base / "run", base / "model", ExportOptions())
    pixels = np.random.default_rng(0).integers(0, 255, (40, 28, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(base / "a.png")
    questions = ["what is this?", "why?"]
    try:
        loaded = load_model(base / "run")
        prompts = [Prompt.from_question(loaded, text, [base / "a.png"]) for text in questions]
        answers = generate(loaded, prompts, max_new_tokens=24)
    finally:
        destroy_distributed()
    rows = [{"id": text, "image": "a.png", "question": text} for text in questions]
    (base / "heldout.json").write_text(json.dumps(rows))
    (base / "answers.json").write_text(json.dumps(dict(zip(questions, answers, strict=True))))
    return base / "model", base


def _ask(model: Path, data: Path, answers: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / "quickstart" / "ask.py")]
    command += ["--model", str(model), "--data", str(data), "--answers", str(answers)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_export_answers_like_the_training_stack(model_and_data: tuple[Path, Path]) -> None:
    model, data = model_and_data
    done = _ask(model, data, data / "answers.json")
    assert done.returncode == 0, done.stderr
    for question, answer in json.loads((data / "answers.json").read_text()).items():
        assert f"{question}  {answer}" in done.stdout


def test_another_answer_is_told(model_and_data: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = model_and_data
    answers: dict[str, Any] = json.loads((data / "answers.json").read_text())
    answers["why?"] = "because"
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    done = _ask(model, data, tmp_path / "answers.json")
    assert done.returncode == 1
    assert "the training stack answered: because" in done.stdout
    assert "1 of 2 answers differ" in done.stderr


def test_questions_are_spread_over_the_file() -> None:
    questions = [{"id": str(number)} for number in range(600)]
    assert [one["id"] for one in pick(questions, 3)] == ["0", "200", "400"]
    assert pick(questions[:2], 12) == questions[:2]
