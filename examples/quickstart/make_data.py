"""Write the demo's images and its LLaVA-format JSON files.

    python -m examples.quickstart.make_data --output outputs/quickstart/data

Per split (train, validation) three files in LLaVA's format, one per training stage: short captions,
dense captions, conversations; train/stage3 holds multi-turn and text-only records too. The held-out
split has no conversations but questions with their expected answers. All three splits use the
handwriting of different forms (see digits.py). The same seed writes the same bytes.
"""

import json
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from examples.quickstart.digits import DigitBank, load_bank
from examples.quickstart.language import (
    ASKERS,
    Turn,
    ask,
    dense_caption,
    sample_turns,
    short_caption,
    text_only_turn,
)
from examples.quickstart.questions import Question
from examples.quickstart.scenes import PLACE_NAMES, Scene, render_scene, sample_scene
from megatron_dattn.errors import EXIT_USER_ERROR, DataError, UserError
from megatron_dattn.runtime.tool import ToolParser

CAPTION_PROMPT = "Which digits are in the picture?"
DENSE_PROMPT = "Describe the picture."
MAX_TURNS = 4
CONVERSATIONS_PER_IMAGE = 2
TEXT_ONLY_SHARE = 0.05


@dataclass(frozen=True)
class DataOptions:
    """How much data to make."""

    output: Path
    grid: int = 2
    seed: int = 0
    train_images: int = 6000
    validation_images: int = 200
    heldout_images: int = 200
    questions_per_category: int = 100

    def __post_init__(self) -> None:
        if self.grid not in PLACE_NAMES:
            raise DataError(f"--grid {self.grid} is not one of {sorted(PLACE_NAMES)}")
        counts = (self.train_images, self.validation_images, self.heldout_images)
        if min(*counts, self.questions_per_category) < 1:
            raise DataError("the numbers of images and of questions must be at least 1")


@dataclass(frozen=True)
class Picture:
    """A rendered scene: its file (relative to the data folder) and the digits used."""

    scene: Scene
    path: str
    digit_indices: tuple[int, ...]


def _rng(options: DataOptions, *names: object) -> random.Random:
    """A generator of its own for each purpose, so that one file's size never changes another's."""
    return random.Random("/".join(map(str, (options.seed, options.grid, *names))))


def make_pictures(options: DataOptions, split: str, count: int) -> list[Picture]:
    """Render `count` scenes of a split into images/<split>/."""
    bank: DigitBank = load_bank(split)
    folder = options.output / "images" / split
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for index in range(count):
        rng = _rng(options, split, index)
        scene = sample_scene(rng, options.grid)
        image, used = render_scene(scene, bank, rng)
        path = f"images/{split}/{index:06d}.png"
        image.save(options.output / path, compress_level=1)
        pictures.append(Picture(scene=scene, path=path, digit_indices=used))
    return pictures


def llava_record(
    record_id: str, image: str | None, turns: list[tuple[str, str]]
) -> dict[str, object]:
    """One record of LLaVA's JSON; the picture stands before the first question."""
    conversations = []
    for index, (question, answer) in enumerate(turns):
        value = f"<image>\n{question}" if image is not None and index == 0 else question
        conversations.append({"from": "human", "value": value})
        conversations.append({"from": "gpt", "value": answer})
    record: dict[str, object] = {"id": record_id, "conversations": conversations}
    return (
        record
        if image is None
        else {"id": record_id, "image": image, "conversations": conversations}
    )


def _as_pairs(turns: list[Turn]) -> list[tuple[str, str]]:
    return [(turn.question, turn.answer) for turn in turns]


def stage_records(
    options: DataOptions, split: str, pictures: list[Picture], stage: int
) -> list[dict]:
    """The LLaVA records of one stage (1 short captions, 2 dense captions, 3 conversations)."""
    rng = _rng(options, split, f"stage{stage}")
    records: list[dict] = []

    def add(image: str | None, turns: list[tuple[str, str]]) -> None:
        records.append(llava_record(f"stage{stage}-{split}-{len(records):06d}", image, turns))

    for picture in pictures:
        if stage == 1:
            add(picture.path, [(CAPTION_PROMPT, short_caption(picture.scene, rng))])
        elif stage == 2:
            add(picture.path, [(DENSE_PROMPT, dense_caption(picture.scene, rng))])
        else:
            for _ in range(CONVERSATIONS_PER_IMAGE):
                turns = sample_turns(picture.scene, rng.randint(1, MAX_TURNS), rng)
                add(picture.path, _as_pairs(turns))
                if rng.random() < TEXT_ONLY_SHARE:
                    count = rng.randint(1, MAX_TURNS)
                    add(None, _as_pairs([text_only_turn(rng) for _ in range(count)]))
    return records


def heldout_questions(options: DataOptions, pictures: list[Picture]) -> list[Question]:
    """`questions_per_category` questions of every category, over the held-out pictures in turn."""
    questions = []
    for category in ASKERS:
        rng = _rng(options, "heldout", category)
        order = rng.sample(pictures, len(pictures))
        asked = 0
        for attempt in range(20 * options.questions_per_category):
            if asked == options.questions_per_category:
                break
            picture = order[attempt % len(order)]
            turn = ask(picture.scene, category, rng)
            if turn is None:
                continue
            question_id = f"heldout-{category}-{asked:04d}"
            questions.append(
                Question(question_id, picture.path, category, turn.question, turn.answer)
            )
            asked += 1
        if asked < options.questions_per_category:
            raise DataError(
                f"{len(pictures)} held-out images allow only {asked} {category} questions of "
                f"{options.questions_per_category}; make more with --heldout-images"
            )
    return questions


def _write_json(path: Path, records: list[dict]) -> None:
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def make_data(options: DataOptions) -> dict[str, int]:
    """Write everything; returns the number of records per file."""
    written = {}
    for split, count in (
        ("train", options.train_images),
        ("validation", options.validation_images),
    ):
        pictures = make_pictures(options, split, count)
        for stage in (1, 2, 3):
            name = f"stage{stage}.json" if split == "train" else f"stage{stage}_{split}.json"
            records = stage_records(options, split, pictures, stage)
            _write_json(options.output / name, records)
            written[name] = len(records)
    heldout = make_pictures(options, "heldout", options.heldout_images)
    questions = heldout_questions(options, heldout)
    _write_json(options.output / "heldout.json", [asdict(question) for question in questions])
    written["heldout.json"] = len(questions)
    return written


def parse_options() -> DataOptions:
    """Read the command line."""
    parser = ToolParser((__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--grid", type=int, default=DataOptions.grid, help="cells per side")
    parser.add_argument("--seed", type=int, default=DataOptions.seed)
    for name in ("train_images", "validation_images", "heldout_images", "questions_per_category"):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=getattr(DataOptions, name))
    return DataOptions(**vars(parser.parse_args()))


def main() -> int:
    """Command line; returns the exit code."""
    try:
        options = parse_options()
        written = make_data(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    for name, records in written.items():
        print(f"{options.output / name}: {records} records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
