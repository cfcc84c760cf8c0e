"""The folder of an evaluation, from which an interrupted one goes on.

`answers.jsonl` has a line per answer under LLaVA's names (`question_id`, `text`, `model_id`), is
appended to batch by batch, and reaches the disk before the next batch is asked. `evaluation.json`
stands there before the first of them and says what they depend on: another model, another question
or another limit never mixes with them.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_dattn.checkpoint.files import replace_synced
from megatron_dattn.errors import ConfigError, DataError, quoted
from megatron_dattn.evaluation.questions import Question
from megatron_dattn.runtime.append_file import AppendFile
from megatron_dattn.runtime.os_errors import named
from megatron_dattn.runtime.untrusted_file import parse_json, read_json_object

ANSWERS_FILE, FACTS_FILE = "answers.jsonl", "evaluation.json"

Facts = Mapping[str, str | int]


class AnswerFolder:
    """The answers so far, by the key of their question, and the file that more are added to.

    Raises:
        ConfigError: other answers are in the folder, or another process writes there.
        DataError: its files are damaged.
    """

    def __init__(self, folder: Path, facts: Facts) -> None:
        """
        Args:
            facts: what answers depend on; `model` goes into every line.
        """
        self._model = facts["model"]
        with named(folder):
            folder.mkdir(parents=True, exist_ok=True)
        path = folder / ANSWERS_FILE
        self._lock = _locked(path)
        try:
            _require_same(folder, facts)
            _cut_half_line(path)
            self.answers = read_answers(path)
            self._file = AppendFile(path)
        except BaseException:
            os.close(self._lock)
            raise

    def add(self, answered: Iterable[tuple[Question, str]]) -> None:
        """Append those answers that are not there yet, and wait until they are on the disk.

        Raises:
            OSError: none of them was written.
        """
        new = {q.key: (q.id, text) for q, text in answered if q.key not in self.answers}
        lines = [
            json.dumps({"question_id": given, "text": text, "model_id": self._model})
            for given, text in new.values()
        ]
        self._file.append("".join(f"{line}\n" for line in lines).encode())
        self._file.sync()
        self.answers |= {key: text for key, (_, text) in new.items()}

    def close(self) -> None:
        """Let others write here."""
        self._file.close()
        os.close(self._lock)


@contextlib.contextmanager
def opened(folder: Path, facts: Facts) -> Iterator[AnswerFolder]:
    """An `AnswerFolder` that is closed at the end."""
    answers = AnswerFolder(folder, facts)
    try:
        yield answers
    finally:
        answers.close()


def read_answers(path: Path) -> dict[str, str]:
    """The answers of a file by the key of their question, ours or one in LLaVA's format.

    Raises:
        DataError: the file is not there, or has something else than answers in it.
    """
    answers: dict[str, str] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{quoted(str(path))} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        where = f"line {number} of {quoted(str(path))}"
        try:
            record = parse_json(line)
        except ValueError as error:
            raise DataError(f"{where} is damaged: {error}") from None
        given = record if isinstance(record, dict) else {}
        if not isinstance(given.get("text"), str) or "question_id" not in given:
            raise DataError(f"{where} is no answer: it has no question_id and text")
        key = str(given["question_id"])
        if key in answers:
            raise DataError(f"{where} answers question {quoted(key)} once more")
        answers[key] = given["text"]
    return answers


def _locked(path: Path) -> int:
    """An open descriptor that keeps others out; that of a killed process is gone with it."""
    with named(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"another process writes {quoted(str(path))}; wait for it, or give --output another "
            "folder"
        ) from None
    except OSError:
        pass  # some file servers know no locks
    return descriptor


def _require_same(folder: Path, facts: Facts) -> None:
    """Compare what was written with what is wanted; write it where nothing was."""
    file = folder / FACTS_FILE
    try:
        stored: dict[str, Any] = read_json_object(file, DataError)
    except FileNotFoundError:
        if (folder / ANSWERS_FILE).stat().st_size:
            raise ConfigError(
                f"{folder} has an {ANSWERS_FILE} but no {FACTS_FILE} that says whose answers they "
                "are; give --output another folder"
            ) from None
        replace_synced(file, json.dumps(dict(facts), indent=1).encode() + b"\n")
        return
    different = [
        f"{name} is {quoted(value)} now, and was {quoted(stored.get(name, 'not given'))}"
        for name, value in facts.items()
        if stored.get(name) != value
    ]
    if different:
        raise ConfigError(
            f"the answers in {folder} are of another evaluation: {'; '.join(different)}; give "
            "--output another folder"
        )


def _cut_half_line(path: Path) -> None:
    """Drop what a kill has left of a line."""
    with named(path):
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
