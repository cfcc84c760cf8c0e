"""The questions of a data set, and what people answered.

LLaVA's format (`question_id`, `image`, `text`) and plain records (`id`, `images`, `question`), as a
list or one a line. Right answers (`answer`, `answers`), `category` and `options` stand in the same
records, or in a file of their own with the same ids: records too, or VQA-v2's annotations.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_dattn.data.conversation import IMAGE_TOKEN
from megatron_dattn.data.image_files import image_is_there, locate_image
from megatron_dattn.data.record_files import read_records
from megatron_dattn.errors import DataError, quoted
from megatron_dattn.evaluation.choices import options_of, right_letter
from megatron_dattn.evaluation.metrics import Metric, exact
from megatron_dattn.runtime.untrusted_file import read_json_object

ALL = "all"
"""Not a category: the last row of every table."""

_ID, _TEXT, _IMAGES = ("question_id", "id"), ("text", "question"), ("image", "images")
_ANSWERS, _OPTIONS = ("answers", "answer"), ("options", "choices")
_MAX_ANNOTATION_BYTES = 2**30


@dataclass(frozen=True)
class Question:
    """What is asked, about which images, and what is right."""

    id: str | int
    """As it stands in the file, so that other programs find it in the answers."""
    text: str
    images: tuple[str, ...] = ()
    """Names below the folder."""
    folder: str = "."
    answers: tuple[str, ...] = ()
    category: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    """Texts by letter."""

    @property
    def key(self) -> str:
        """The id as text: some files have 12 where others have "12"."""
        return str(self.id)

    @property
    def subject(self) -> tuple[str, ...]:
        """The images, equal for all questions about them; without any, the question's own."""
        return self.images or ("", self.key)

    @property
    def paths(self) -> list[str]:
        """Absolute paths of the images."""
        return [locate_image(self.folder, name) for name in self.images]


def read_questions(
    path: Path,
    *,
    image_root: Path | None = None,
    answers: Path | None = None,
    category: str = "category",
    prompt_suffix: str = "",
    limit: int | None = None,
) -> list[Question]:
    """The questions of a file, all images of which are there.

    Args:
        path: .json or .jsonl.
        image_root: folder of the images; the file's own where None.
        answers: file with right answers, if they stand apart.
        category: name of the field by which tables are divided.
        prompt_suffix: what stands behind every question, on a line of its own.
        limit: how many to take from the beginning; all where None.

    Raises:
        DataError: a record that is none, an id that occurs twice, an image that is not there.
    """
    folder = str(image_root or path.parent)
    apart = {} if answers is None else _by_id(answers)
    questions: dict[str, Question] = {}
    for number, record in enumerate(islice(_records(path), limit)):
        where = f"record {number} of {quoted(str(path))}"
        if not isinstance(record, dict):
            raise DataError(f"{where} must be an object, found {type(record).__name__}")
        given = _field(record, _ID, where)
        found = _question({**apart.get(str(given), {}), **record}, folder, category, where)
        if found.key in questions:
            raise DataError(f"{where} has the question id {quoted(given)} of an earlier one")
        if prompt_suffix:
            found = replace(found, text=f"{found.text}\n{prompt_suffix}")
        questions[found.key] = found
    return list(questions.values())


def require_answers(questions: Iterable[Question], metric: Metric) -> None:
    """Raise DataError for the first question that a metric cannot score."""
    for question in questions:
        count = len(question.answers)
        if count == 0:
            raise DataError(
                f"question {quoted(question.id)} has no right answer, which metric {metric.name} "
                "compares with: give its record the field answer or answers, or the file that has "
                "them (--answers)"
            )
        if count < metric.least_answers:
            raise DataError(
                f"question {quoted(question.id)} has the answers of {count} people, but metric "
                f"{metric.name} needs {metric.least_answers} or more; with one right answer use "
                f"{exact.__name__}"
            )
        if metric.name == "choice":
            _require_letters(question)


def digest(questions: Sequence[Question]) -> str:
    """Sum of all that is asked; answers and categories may be corrected later."""
    asked = [[question.id, question.text, question.images] for question in questions]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _records(path: Path) -> Iterable[Any]:
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{quoted(str(path))} must be a .json or .jsonl file of questions")
    return read_records(path)


def _by_id(path: Path) -> dict[str, dict[str, Any]]:
    """The records of a file of answers, by id, without what the questions themselves say."""
    records: Iterable[Any] = _records(path)
    if path.suffix == ".json" and (annotations := _annotations(path)) is not None:
        records = annotations
    found: dict[str, dict[str, Any]] = {}
    for number, record in enumerate(records):
        where = f"record {number} of {quoted(str(path))}"
        if not isinstance(record, dict):
            raise DataError(f"{where} must be an object, found {type(record).__name__}")
        key = str(_field(record, _ID, where))
        if key in found:
            raise DataError(f"{where} has the question id {quoted(key)} of an earlier one")
        found[key] = {name: value for name, value in record.items() if name not in _TEXT + _IMAGES}
    return found


def _annotations(path: Path) -> list[Any] | None:
    """The list in a file of VQA-v2's annotations; None for a file that is itself a list."""
    try:
        with path.open("rb") as file:
            if not file.read(64).lstrip().startswith(b"{"):
                return None
        content = read_json_object(path, DataError, max_bytes=_MAX_ANNOTATION_BYTES)
    except OSError as error:
        raise DataError(f"{quoted(str(path))} cannot be read: {error.strerror}") from error
    if not isinstance(content.get("annotations"), list):
        raise DataError(f"{quoted(str(path))} is neither a list of records nor has annotations")
    return content["annotations"]


def _question(record: Mapping[str, Any], folder: str, category: str, where: str) -> Question:
    text = _field(record, _TEXT, where)
    if not isinstance(text, str):
        raise DataError(f"{where} has a question that is no text: {quoted(text)}")
    group = record.get(category, "")
    if group == ALL:
        raise DataError(f"{where} has the category '{ALL}', which names all questions together")
    options = next((record[name] for name in _OPTIONS if name in record), None)
    return Question(
        id=_field(record, _ID, where),
        text=_without_marker(text, where),
        images=_images(record, folder, where),
        folder=folder,
        answers=_answers(record, where),
        category=str(group),
        options=options_of(options, text),
    )


def _field(record: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    """The value under the first of these names that a record has."""
    for name in names:
        if name in record:
            value = record[name]
            if names is not _ID or (isinstance(value, str | int) and not isinstance(value, bool)):
                return value
            raise DataError(f"{where} has {name} {quoted(value)}, which must be text or a number")
    raise DataError(f"{where} has no {' or '.join(names)}; it has {', '.join(map(str, record))}")


def _without_marker(text: str, where: str) -> str:
    """Images stand in front, as LLaVA moves the only one of a message."""
    if text.count(IMAGE_TOKEN) > 1:
        raise DataError(
            f"{where} has {IMAGE_TOKEN} several times in its question; images stand in front of "
            "it, so leave the markers out"
        )
    return text.replace(IMAGE_TOKEN, "").strip() if IMAGE_TOKEN in text else text


def _images(record: Mapping[str, Any], folder: str, where: str) -> tuple[str, ...]:
    value = next((record[name] for name in _IMAGES if record.get(name)), ())
    names = (value,) if isinstance(value, str) else tuple(value)
    for name in names:
        if not isinstance(name, str):
            raise DataError(f"{where} names an image by {quoted(name)}, which is no path")
        if not image_is_there(folder, name):
            raise DataError(
                f"{where}: there is no image {quoted(name)} below {quoted(folder)}; --image-root "
                "names the images' folder"
            )
    return names


def _answers(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    value = next((record[name] for name in _ANSWERS if name in record), ())
    given = value if isinstance(value, list | tuple) else [value]
    # VQA-v2's are objects, one for each person.
    texts = [one.get("answer") if isinstance(one, dict) else one for one in given]
    for text in texts:
        if not isinstance(text, str | int | float) or isinstance(text, bool):
            raise DataError(
                f"{where} has the answer {quoted(text)}, which must be text or a number"
            )
    return tuple(map(str, texts))


def _require_letters(question: Question) -> None:
    for answer in question.answers:
        if right_letter(answer, question.options) is None:
            offered = ", ".join(question.options) or "none that is known"
            raise DataError(
                f"question {quoted(question.id)} has the right answer {quoted(answer)}, which is "
                f"none of its options ({offered}), by letter, number or text"
            )
