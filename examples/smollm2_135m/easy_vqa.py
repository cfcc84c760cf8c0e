"""easy-VQA as LLaVA's JSON: captions for the adapter, conversations, test questions.

The package holds PNG files and, for each split, rows of question, answer and image number. Whatever
training sees comes of the training split; the test split becomes questions and nothing else.

    python -m examples.smollm2_135m.easy_vqa --package packages/easy_vqa --output data
"""

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_dattn.errors import EXIT_USER_ERROR, DataError, UserError
from megatron_dattn.runtime.tool import ToolParser

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
TYPES = {
    "shape": "which shape",
    "color": "which colour",
    "has_shape": "is there that shape",
    "lacks_shape": "is there not that shape",
    "has_color": "is there that colour",
    "lacks_color": "is there not that colour",
}
# Later questions of a conversation can be answered from its earlier answers, without the picture.
TURNS = 4
VALIDATION_IMAGES = 100


@dataclass(frozen=True)
class Row:
    """One question of the data set."""

    question: str
    answer: str
    image: int

    @property
    def type(self) -> str:
        """One of TYPES.

        Raises DataError for a question of another kind.
        """
        words = set(re.findall(r"\w+", self.question))
        if self.answer in SHAPES:
            return "shape"
        if self.answer in COLORS:
            return "color"
        asked = "shape" if words & set(SHAPES) else "color" if words & set(COLORS) else ""
        if self.answer not in ("yes", "no") or not asked:
            raise DataError(f"easy-VQA has no question like {self.question!r}: {self.answer!r}")
        return f"{'lacks' if words & {'no', 'not'} else 'has'}_{asked}"


@dataclass(frozen=True)
class Label:
    """What the questions about an image tell of it; None where no question does."""

    shape: str | None
    color: str | None


def read_rows(package: Path, split: str) -> list[Row]:
    """The questions of a split, `train` or `test`, in the package's order."""
    path = package / "data" / split / "questions.json"
    try:
        return [Row(*row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} does not hold easy-VQA's questions: {error}") from error


def labels(rows: Iterable[Row]) -> dict[int, Label]:
    """Shape and colour by image, put together of all its questions and answers."""
    known: dict[int, set[str]] = {}
    for row in rows:
        words = set(re.findall(r"\w+", row.question))
        found = known.setdefault(row.image, set())
        if row.answer not in ("yes", "no"):
            found |= {row.answer} | words  # "what is the blue shape?" says a colour, too
        elif (row.answer == "yes") != bool(words & {"no", "not"}):
            found |= words
    return {
        image: Label(_one(SHAPES, words), _one(COLORS, words)) for image, words in known.items()
    }


def _one(names: Sequence[str], words: set[str]) -> str | None:
    found = [name for name in names if name in words]
    if len(found) > 1:
        raise DataError(f"the questions about an easy-VQA image contradict each other: {found}")
    return found[0] if found else None


def captions(known: Mapping[int, Label]) -> list[dict[str, Any]]:
    """LLaVA records of captions, for the images whose shape and colour are known."""
    return [
        _record(f"caption-{image}", image, [("Describe the image.", f"a {one.color} {one.shape}")])
        for image, one in sorted(known.items())
        if one.shape and one.color
    ]


def conversations(rows: Iterable[Row], seed: int) -> list[dict[str, Any]]:
    """LLaVA records that ask all questions, some at a time; order and grouping by the seed."""
    rng = random.Random(f"easy-vqa/{seed}")
    by_image: dict[int, list[Row]] = {}
    for row in rows:
        by_image.setdefault(row.image, []).append(row)
    records = []
    for image, asked in sorted(by_image.items()):
        rng.shuffle(asked)
        for start in range(0, len(asked), TURNS):
            turns = [(_sentence(row.question), row.answer) for row in asked[start : start + TURNS]]
            records.append(_record(f"{image}-{start}", image, turns))
    rng.shuffle(records)
    return records


def _sentence(question: str) -> str:
    """With a capital, as people write to a language model."""
    return question[:1].upper() + question[1:]


def _record(name: str, image: int, turns: Iterable[tuple[str, str]]) -> dict[str, Any]:
    messages: list[dict[str, str]] = []
    for question, answer in turns:
        value = question if messages else f"<image>\n{question}"
        messages += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": f"{image}.png", "conversations": messages}


@dataclass(frozen=True)
class TestQuestion:
    """A question of the test split."""

    id: str
    image: str
    question: str
    answer: str
    type: str
    blind: str
    """The commonest answer to these words in the training split."""


def test_questions(train: Iterable[Row], test: Sequence[Row]) -> list[TestQuestion]:
    """The test split, each question with what an answer that never looks would say."""
    counts: dict[str, Counter[str]] = {}
    for row in train:
        counts.setdefault(row.question, Counter())[row.answer] += 1
    return [
        TestQuestion(
            id=str(number),
            image=f"{row.image}.png",
            question=_sentence(row.question),
            answer=row.answer,
            type=row.type,
            blind=_commonest(counts.get(row.question, Counter())),
        )
        for number, row in enumerate(test)
    ]


def _commonest(counts: Counter[str]) -> str:
    """The first in the alphabet among equals; `yes` for words that training never had."""
    return min(counts, key=lambda answer: (-counts[answer], answer), default="yes")


def convert(package: Path, output: Path, seed: int) -> None:
    """Write captions, conversations, their validation files, and the test questions."""
    train, test = read_rows(package, "train"), read_rows(package, "test")
    images = sorted({row.image for row in train})
    held = set(random.Random(f"validation/{seed}").sample(images, VALIDATION_IMAGES))
    output.mkdir(parents=True, exist_ok=True)
    for suffix, rows in (
        ("", [row for row in train if row.image not in held]),
        ("_validation", [row for row in train if row.image in held]),
    ):
        _write(output / f"adapter{suffix}.json", captions(labels(rows)))
        _write(output / f"everything{suffix}.json", conversations(rows, seed))
    _write(output / "test.json", [asdict(question) for question in test_questions(train, test)])


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")
    print(f"{path}: {len(rows)} records", flush=True)


def main() -> int:
    parser = ToolParser(__doc__)
    parser.add_argument("--package", type=Path, required=True, help="folder of package easy_vqa")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="which questions stand together")
    options = parser.parse_args()
    try:
        convert(options.package, options.output, options.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
