"""The folder that an evaluation goes on from: nothing is lost, nothing is mixed."""

import json
from pathlib import Path

import pytest

from megatron_dattn.errors import ConfigError, DataError
from megatron_dattn.evaluation.answers import ANSWERS_FILE, FACTS_FILE, opened, read_answers
from megatron_dattn.evaluation.questions import Question

FACTS = {"model": "run/step-0000001@abc", "max_new_tokens": 4}
FIRST, SECOND = Question(1, "x"), Question("two", "y")


def test_answers_are_there_when_the_folder_is_opened_again(tmp_path: Path) -> None:
    with opened(tmp_path / "new", FACTS) as folder:
        folder.add([(FIRST, "a dog")])
        folder.add([(FIRST, "not again"), (SECOND, "ü\n")])
    lines = (tmp_path / "new" / ANSWERS_FILE).read_text().splitlines()
    assert json.loads(lines[0]) == {"question_id": 1, "text": "a dog", "model_id": FACTS["model"]}
    with opened(tmp_path / "new", FACTS) as folder:
        assert folder.answers == {"1": "a dog", "two": "ü\n"}


def test_half_a_line_is_cut_and_answered_again(tmp_path: Path) -> None:
    with opened(tmp_path, FACTS) as folder:
        folder.add([(FIRST, "a dog"), (SECOND, "a cat")])
    path = tmp_path / ANSWERS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with opened(tmp_path, FACTS) as folder:
        assert folder.answers == {"1": "a dog"}
        folder.add([(SECOND, "a cat")])
    assert path.read_bytes() == whole


def test_answers_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path, FACTS) as folder:
        folder.add([(FIRST, "a dog")])
    before = (tmp_path / ANSWERS_FILE).read_bytes()
    other = {**FACTS, "model": "run/step-0000002@def"}
    message = "model is 'run/step-0000002@def' now, and was 'run/step-0000001@abc'; give --output"
    with pytest.raises(ConfigError, match=message), opened(tmp_path, other):
        pass
    (tmp_path / FACTS_FILE).unlink()
    with pytest.raises(ConfigError, match=r"no evaluation\.json"), opened(tmp_path, FACTS):
        pass
    assert (tmp_path / ANSWERS_FILE).read_bytes() == before


def test_two_evaluations_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with (
        opened(tmp_path, FACTS),
        pytest.raises(ConfigError, match="another process writes"),
        opened(tmp_path, FACTS),
    ):
        pass
    with opened(tmp_path, FACTS):
        pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json\n", "line 1 .* is damaged"),
        ('{"question_id": 1}\n', "line 1 .* is no answer"),
        ("[]\n", "line 1 .* is no answer"),
        ('{"question_id": 1, "text": "a"}\n' * 2, "line 2 .* answers question '1' once more"),
    ],
)
def test_what_is_no_file_of_answers_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_answers(path)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_answers(tmp_path / "none.jsonl")
