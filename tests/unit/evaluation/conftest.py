"""A run folder of a tiny model, three pictures, and questions about them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.run_folders import make_run_folder
from tests.unit.conversion.conftest import own_modules
from tests.unit.conversion.hf_models import save_language, save_vision

__all__ = ["own_modules"]

NUM_IMAGES = 3


def save_questions(folder: Path, count: int = 10, **fields: Any) -> Path:
    """Questions of LLaVA's format in two categories, the last without an image."""
    for index in range(NUM_IMAGES):
        pixels = np.random.default_rng(index).integers(0, 255, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    records = [
        {
            "question_id": number,
            "image": f"{number % NUM_IMAGES}.png",
            "text": "what is " + "this " * (1 + number % 4),
            "answer": "a",
            "category": "even" if number % 2 == 0 else "odd",
            **fields,
        }
        for number in range(count)
    ]
    del records[-1]["image"]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def save_run_and_questions(folder: Path, run: str) -> Path:
    """The run folder of a tiny `dattn` under that name, and the file of the questions."""
    save_vision(folder / "vision")
    save_language(folder / "language")
    make_run_folder(folder, folder / run, "dattn")
    return save_questions(folder)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has the run folder `dattn` and the questions."""
    base = tmp_path_factory.mktemp("evaluation")
    save_run_and_questions(base, "dattn")
    return base
