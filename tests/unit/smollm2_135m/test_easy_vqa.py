"""easy-VQA's rows become LLaVA records; nothing of the test split reaches training."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from examples.smollm2_135m import easy_vqa
from examples.smollm2_135m.easy_vqa import Label, Row
from megatron_dattn.data.conversation import parse_record
from megatron_dattn.errors import DataError
from tests.unit.smollm2_135m.package import write_package


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("what shape is present?", "circle", "shape"),
        ("what is the blue shape?", "rectangle", "shape"),
        ("what is the color of the shape?", "teal", "color"),
        ("does the image contain a triangle?", "no", "has_shape"),
        ("is there not a circle in the image?", "yes", "lacks_shape"),
        ("is a red shape present?", "yes", "has_color"),
        ("is no gray shape present?", "no", "lacks_color"),
    ],
)
def test_a_question_has_one_type(question: str, answer: str, expected: str) -> None:
    assert Row(question, answer, 0).type == expected


def test_a_question_of_another_kind_is_refused() -> None:
    with pytest.raises(DataError, match="no question like 'how many shapes are there"):
        _ = Row("how many shapes are there?", "2", 0).type


def test_labels_are_what_the_answers_say() -> None:
    known = easy_vqa.labels(
        [
            Row("what is the blue shape?", "rectangle", 0),
            Row("is there not a circle?", "no", 1),
            Row("is a red shape present?", "yes", 1),
            Row("is a red shape present?", "no", 2),
            Row("is no red shape present?", "yes", 2),
        ]
    )
    assert known == {
        0: Label("rectangle", "blue"),
        1: Label("circle", "red"),
        2: Label(None, None),
    }


def test_contradicting_answers_are_refused() -> None:
    rows = [Row("is a red shape present?", "yes", 0), Row("what color is the shape?", "blue", 0)]
    with pytest.raises(DataError, match="contradict"):
        easy_vqa.labels(rows)


def test_captions_are_of_images_that_are_fully_known() -> None:
    (record,) = easy_vqa.captions({3: Label("circle", "red"), 4: Label("circle", None)})
    conversation = parse_record(record)
    assert conversation.images == ("3.png",)
    assert conversation.turns[1].text == "a red circle"


def test_conversations_ask_every_question_once() -> None:
    rows = [Row(f"is a red shape present? {n}", "no", n % 3) for n in range(20)]
    records = easy_vqa.conversations(rows, seed=0)
    asked = Counter()
    for record in records:
        conversation = parse_record(record)
        assert conversation.turns[0].num_images == 1
        assert sum(turn.num_images for turn in conversation.turns) == 1
        assert conversation.num_exchanges <= easy_vqa.TURNS
        questions = [turn for turn in conversation.turns if turn.role == "user"]
        asked.update(turn.text.replace("<image>", "").strip() for turn in questions)
    assert asked == Counter(row.question.replace("is", "Is", 1) for row in rows)
    assert records == easy_vqa.conversations(rows, seed=0)
    assert records != easy_vqa.conversations(rows, seed=1)


def test_without_looking_the_commonest_answer_of_training_is_given() -> None:
    train = [Row("is a red shape present?", answer, 0) for answer in ("no", "yes", "no")]
    train += [Row("what shape is present?", answer, 0) for answer in ("triangle", "circle")]
    test = [
        Row("is a red shape present?", "yes", 0),
        Row("what shape is present?", "rectangle", 0),
        Row("is there a circle?", "yes", 1),
    ]
    made = easy_vqa.test_questions(train, test)
    assert [question.blind for question in made] == ["no", "circle", "yes"]
    assert [question.image for question in made] == ["0.png", "0.png", "1.png"]
    assert made[0].question == "Is a red shape present?"


def test_validation_and_training_share_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(easy_vqa, "VALIDATION_IMAGES", 2)
    package = write_package(tmp_path / "package", 8)
    easy_vqa.convert(package, tmp_path / "data", seed=0)
    images = {}
    for name in ("adapter", "everything"):
        for suffix in ("", "_validation"):
            records = json.loads((tmp_path / "data" / f"{name}{suffix}.json").read_text())
            images[name + suffix] = {record["image"] for record in records}
    for name in ("adapter", "everything"):
        assert len(images[name]) == 6
        assert len(images[f"{name}_validation"]) == 2
        assert not images[name] & images["everything_validation"]
    assert len(json.loads((tmp_path / "data" / "test.json").read_text())) == 8 * 6


def test_training_reads_nothing_of_the_test_split(tmp_path: Path) -> None:
    package = write_package(tmp_path / "package", 4)
    rows = easy_vqa.read_rows(package, "train")
    (package / "data" / "test" / "questions.json").unlink()
    random.Random(0).shuffle(rows)
    assert easy_vqa.labels(rows)[0] == Label("circle", "black")
    with pytest.raises(DataError, match=r"test/questions\.json does not hold"):
        easy_vqa.read_rows(package, "test")
