"""The measurement runs for both generators, and compares answers before it does."""

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import bench_image_cache
from benchmarks.bench_image_cache import check
from benchmarks.image_questions import (
    ExportedModel,
    Generator,
    OwnGenerator,
    Questions,
    random_export,
    random_loaded,
    sizes,
)
from megatron_dattn.models.config import ModelConfig
from tests.support.vlm import VISION

QUESTIONS = Questions(number=2, images=2, text_tokens=4, answer_tokens=3)


def tiny() -> ModelConfig:
    model = sizes(hidden_size=64, layers=2)
    return dataclasses.replace(model, vision=VISION)


@pytest.fixture(params=["exported model", "own generator"])
def generator(request, one_process) -> Generator:
    torch.manual_seed(0)
    if request.param == "exported model":
        return ExportedModel(random_export(tiny()), QUESTIONS)
    return OwnGenerator(random_loaded(tiny()), QUESTIONS)


def test_answers_agree(generator: Generator) -> None:
    name, equal, difference = check(generator, QUESTIONS)
    assert (name, equal) == (generator.name, "2 of 2")
    assert float(difference) < 1e-5  # fp32 sums in another order
    assert "8 visual tokens" in generator.description
    assert len(generator.answer(1, 3)) == 3


def test_a_kept_image_that_changes_answers_is_noticed(generator: Generator, monkeypatch) -> None:
    answer = generator.answer
    monkeypatch.setattr(
        generator, "answer", lambda number, tokens, kept=None: [*answer(number, tokens), kept]
    )
    with pytest.raises(AssertionError, match=f"changed an answer of the {generator.name}"):
        check(generator, QUESTIONS)


def test_the_table_has_both_generators(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bench_image_cache, "sizes", lambda *_: tiny())
    output = tmp_path / "cache.md"
    load = ["--questions", "2", "--answer-tokens", "2", "--rounds", "1", "--output", str(output)]
    assert bench_image_cache.main(load) == 0
    cells = [line.strip("| ").split(" | ") for line in output.read_text().splitlines()]
    times, checks = (
        [
            token
            for token in cells
            if len(token) == width and token[0] in ("exported model", "own generator")
        ]
        for width in (7, 3)
    )
    assert [token[0] for token in times] == [token[0] for token in checks]
    assert len(times) == 2
    assert all(float(cell.split()[0]) > 0 for token in times for cell in token[1:])


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path, capsys) -> None:
    assert bench_image_cache.main(["--run", str(tmp_path)]) == 2
    assert "is it the folder of a run?" in capsys.readouterr().err
