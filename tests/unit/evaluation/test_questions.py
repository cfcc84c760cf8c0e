"""Reading questions in every format, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dattn.errors import DataError
from megatron_dattn.evaluation.metrics import METRICS
from megatron_dattn.evaluation.questions import (
    Question,
    digest,
    read_questions,
    require_answers,
)
from tests.unit.evaluation.conftest import save_questions


def save(folder: Path, *records: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_llavas_format(tmp_path: Path) -> None:
    path = save_questions(tmp_path)
    questions = read_questions(path)
    assert len(questions) == 10
    first, last = questions[0], questions[-1]
    assert first == Question(0, "what is this ", ("0.png",), str(tmp_path), ("a",), category="even")
    assert first.paths == [str(tmp_path / "0.png")]
    assert last.images == ()
    assert last.subject != questions[-2].subject
    assert len(read_questions(path, limit=3)) == 3


def test_plain_records_and_other_names(tmp_path: Path) -> None:
    save_questions(tmp_path)
    path = save(
        tmp_path,
        {"id": "x", "images": ["0.png", "1.png"], "question": "same?", "answers": ["yes", 1]},
        {
            "id": "y",
            "question": "<image>\nwhich?",
            "choices": ["a dog", "a cat"],
            "kind": "letters",
        },
    )
    first, second = read_questions(path, category="kind", prompt_suffix="Be brief.")
    assert (first.images, first.answers) == (("0.png", "1.png"), ("yes", "1"))
    assert first.text == "same?\nBe brief."
    assert (second.text, second.category) == ("which?\nBe brief.", "letters")
    assert second.options == {"A": "a dog", "B": "a cat"}


def test_answers_in_a_file_of_their_own(tmp_path: Path) -> None:
    path = save(tmp_path, {"question_id": 7, "text": "what?"})
    annotation = {"question_id": 7, "question_type": "what", "answers": [{"answer": "a"}] * 10}
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps({"annotations": [annotation]}))
    (question,) = read_questions(path, answers=file, category="question_type")
    assert (question.answers, question.category) == (("a",) * 10, "what")
    listed = save(tmp_path, {"id": "7", "text": "not the question", "answer": "b"}, name="a.jsonl")
    (question,) = read_questions(path, answers=listed)
    assert (question.text, question.answers) == ("what?", ("b",))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"id": 1, "text": "x"}, {"id": "1", "text": "y"}], "record 1 .* id '1' of an earlier"),
        ([{"text": "x"}], "has no question_id or id; it has text"),
        ([{"id": 1}], "has no text or question"),
        ([{"id": 1.5, "text": "x"}], "must be text or a number"),
        ([{"id": 1, "text": 5}], "a question that is no text: 5"),
        ([["x"]], "must be an object, found list"),
        ([{"id": 1, "text": "x", "image": "none.png"}], "no image 'none.png' .* --image-root"),
        ([{"id": 1, "text": "x", "image": "../x.png"}], "leaves its image root"),
        ([{"id": 1, "text": "x", "image": [5]}], "names an image by 5"),
        ([{"id": 1, "text": "<image> and <image>"}], "<image> several times"),
        ([{"id": 1, "text": "x", "category": "all"}], "category 'all'"),
        ([{"id": 1, "text": "x", "answer": None}], "the answer None, which must be"),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path: Path, records: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_questions(save(tmp_path, *records))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"must be a \.json or \.jsonl file"):
        read_questions(tmp_path / "x.csv")
    path = save(tmp_path, {"id": 1, "text": "x"})
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(DataError, match="nor has annotations"):
        read_questions(path, answers=tmp_path / "object.json")
    twice = save(tmp_path, {"id": 1, "answer": "x"}, {"id": 1, "answer": "y"}, name="twice.jsonl")
    with pytest.raises(DataError, match="of an earlier one"):
        read_questions(path, answers=twice)


def test_every_metric_says_which_answers_it_lacks() -> None:
    with pytest.raises(DataError, match=r"question 'q' has no right answer.*--answers"):
        require_answers([Question("q", "x")], METRICS["anls"])
    with pytest.raises(DataError, match="answers of 3 people, but metric vqa needs 4"):
        require_answers([Question("q", "x", answers=("a",) * 3)], METRICS["vqa"])
    options = {"A": "a dog", "B": "a cat"}
    with pytest.raises(DataError, match="'D', which is none of its options"):
        require_answers([Question("q", "x", answers=("D",), options=options)], METRICS["choice"])
    require_answers([Question("q", "x", answers=("a",) * 4)], METRICS["vqa"])


def test_the_digest_is_of_what_is_asked_alone() -> None:
    one = Question("q", "x", ("a.png",), "folder", ("right",))
    assert digest([one]) == digest([Question("q", "x", ("a.png",), "moved", ("corrected",))])
    assert digest([one]) != digest([Question("q", "y", ("a.png",))])
