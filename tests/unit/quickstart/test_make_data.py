"""The written data: LLaVA's schema, truth, disjoint handwriting, the same bytes from a seed."""

import hashlib
import json
import random
import re
from pathlib import Path

import pytest
from PIL import Image

from examples.quickstart.digits import split_indices
from examples.quickstart.make_data import (
    DataOptions,
    Picture,
    heldout_questions,
    make_data,
    make_pictures,
    stage_records,
)
from examples.quickstart.questions import CATEGORY_TITLES, load_questions
from examples.quickstart.scenes import sample_scene
from megatron_dattn.errors import DataError
from tests.unit.quickstart import oracle


def options(output: Path, **changes: int) -> DataOptions:
    small = {
        "train_images": 30,
        "validation_images": 6,
        "heldout_images": 12,
        "questions_per_category": 8,
    }
    return DataOptions(output=output, **(small | changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(options(folder))
    return folder


def all_bytes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def imaginary_pictures(count: int, grid: int = 2) -> list[Picture]:
    rng = random.Random(3)
    return [Picture(sample_scene(rng, grid), f"images/x/{i}.png", ()) for i in range(count)]


def test_the_seed_decides_every_byte(data: Path, tmp_path: Path) -> None:
    make_data(options(tmp_path / "same"))
    make_data(options(tmp_path / "other", seed=1))
    assert all_bytes(tmp_path / "same") == all_bytes(data)
    other = all_bytes(tmp_path / "other")
    assert other.keys() == all_bytes(data).keys()
    assert all(other[name] != digest for name, digest in all_bytes(data).items())


def test_more_training_images_change_nothing_else(data: Path, tmp_path: Path) -> None:
    make_data(options(tmp_path, train_images=31))
    more, less = all_bytes(tmp_path), all_bytes(data)
    changed = {name for name in less if more[name] != less[name]}
    assert changed == {"stage1.json", "stage2.json", "stage3.json"}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("suffix", ["", "_validation"])
def test_records_follow_llava_schema(data: Path, stage: int, suffix: str) -> None:
    records = json.loads((data / f"stage{stage}{suffix}.json").read_text())
    assert len({record["id"] for record in records}) == len(records) > 0
    for record in records:
        assert set(record) <= {"id", "image", "conversations"}
        roles = [turn["from"] for turn in record["conversations"]]
        assert roles == ["human", "gpt"] * (len(roles) // 2)
        assert roles
        values = [turn["value"] for turn in record["conversations"]]
        assert all(value.strip() == value and value for value in values)
        marks = [value.count("<image>") for value in values]
        assert sum(marks) == marks[0] == ("image" in record)
        if "image" in record:
            assert values[0].startswith("<image>\n")
            with Image.open(data / record["image"]) as image:
                assert image.size == (64, 64)
                assert image.mode == "RGB"
        if stage < 3:
            assert len(values) == 2
            assert "image" in record


def test_conversations_are_true() -> None:
    pictures = imaginary_pictures(150)
    scene_of = {picture.path: picture.scene for picture in pictures}
    records = stage_records(options(Path("unused")), "train", pictures, 3)
    text_only = multi_turn = 0
    for record in records:
        values = [turn["value"] for turn in record["conversations"]]
        multi_turn += len(values) > 2
        for question, answer in zip(values[::2], values[1::2], strict=True):
            if "image" in record:
                scene = scene_of[record["image"]]
                board = oracle.board_of(2, scene.cells)
                assert answer == oracle.answer(board, question.removeprefix("<image>\n"))
            else:
                assert answer == oracle.text_answer(question)
        text_only += "image" not in record
    assert text_only >= 3
    assert multi_turn > len(records) / 3


def test_captions_belong_to_their_pictures() -> None:
    pictures = imaginary_pictures(50)
    for stage in (1, 2):
        records = stage_records(options(Path("unused")), "train", pictures, stage)
        for picture, record in zip(pictures, records, strict=True):
            assert record["image"] == picture.path
            caption = record["conversations"][1]["value"]
            if stage == 1:
                assert [int(d) for d in re.findall(r"\d", caption)] == picture.scene.digits
            else:
                board = oracle.board_of(2, picture.scene.cells)
                assert oracle.read_dense_caption(2, caption) == oracle.places(board)


@pytest.mark.parametrize("grid", [2, 3])
def test_heldout_questions_are_true(grid: int) -> None:
    pictures = imaginary_pictures(40, grid)
    scene_of = {picture.path: picture.scene for picture in pictures}
    questions = heldout_questions(options(Path("unused"), grid=grid), pictures)
    for category in CATEGORY_TITLES:
        assert sum(question.category == category for question in questions) == 8
    for question in questions:
        board = oracle.board_of(grid, scene_of[question.image].cells)
        assert question.answer == oracle.answer(board, question.question)


def test_heldout_file_names_existing_heldout_images(data: Path) -> None:
    questions = load_questions(data / "heldout.json")
    assert len({question.id for question in questions}) == len(questions) == 48
    for question in questions:
        assert question.image.startswith("images/heldout/")
        assert (data / question.image).is_file()


def test_splits_use_disjoint_handwriting(tmp_path: Path) -> None:
    used = {
        split: {
            place
            for picture in make_pictures(options(tmp_path), split, 40)
            for place in picture.digit_indices
        }
        for split in ("train", "validation", "heldout")
    }
    for split, places in used.items():
        assert places
        assert places <= set(split_indices(split))
    assert not used["train"] & used["heldout"]
    assert not used["train"] & used["validation"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"grid": 5}, "--grid 5"), ({"heldout_images": 0}, "at least 1")],
)
def test_impossible_options_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        options(Path("unused"), **changes)
