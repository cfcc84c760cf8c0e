"""What is said about a scene: captions, dense captions, questions with answers.

Every function takes the scene and a random generator and returns text alone, so the tokenizer and
the language model can learn the demo's language from random scenes without seeing a picture.
Answers are short and unique, so that they can be compared word by word. A few questions need no
picture at all.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from examples.quickstart.scenes import Scene

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Turn:
    """One question and its answer; `category` names the kind of question."""

    question: str
    answer: str
    category: str


def join_words(words: list[str]) -> str:
    """Enumerate: `a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def short_caption(scene: Scene, rng: random.Random) -> str:
    """Stage 1: which digits are in the picture, in reading order."""
    digits = join_words([str(digit) for digit in scene.digits])
    count = NUMBER_WORDS[len(scene.digits)]
    noun = "digit" if len(scene.digits) == 1 else "digits"
    return rng.choice((f"{count} {noun}: {digits}.", f"the {noun} {digits}."))


def dense_caption(scene: Scene, rng: random.Random) -> str:
    """Stage 2: every digit and where it stands, and the empty places."""
    if rng.random() < 0.5:
        shown = [
            f"{place}: {'empty' if digit is None else digit}"
            for place, digit in zip(scene.places, scene.cells, strict=True)
        ]
        return ", ".join(shown) + "."
    parts = [
        f"a {digit} at the {place}"
        for place, digit in zip(scene.places, scene.cells, strict=True)
        if digit is not None
    ]
    rest = "" if len(parts) == len(scene.cells) else ", the rest is empty"
    return join_words(parts) + rest + "."


def ask_digit_at(scene: Scene, rng: random.Random) -> Turn:
    """Which digit stands at a named place."""
    cell = rng.randrange(len(scene.cells))
    digit = scene.cells[cell]
    place = scene.places[cell]
    question = rng.choice((f"Which digit is at the {place}?", f"What is at the {place}?"))
    return Turn(question, "empty" if digit is None else str(digit), "digit_at")


def ask_where(scene: Scene, rng: random.Random) -> Turn:
    """Where a digit stands: a place, several places, or nowhere."""
    digit = rng.choice(scene.digits) if rng.random() < 0.85 else rng.randrange(10)
    places = [scene.places[cell] for cell in scene.cells_of(digit)]
    question = rng.choice((f"Where is the digit {digit}?", f"Where is the {digit}?"))
    return Turn(question, join_words(places) if places else "nowhere", "where")


def ask_count(scene: Scene, rng: random.Random) -> Turn:
    """How many digits there are."""
    question = rng.choice(("How many digits are there?", "How many digits do you see?"))
    return Turn(question, str(len(scene.digits)), "how_many")


def ask_count_of(scene: Scene, rng: random.Random) -> Turn:
    """How many times one digit is there; often one that is present, often one that is not."""
    digit = rng.choice(scene.digits) if rng.random() < 0.6 else rng.randrange(10)
    question = f"How many times is the digit {digit} there?"
    return Turn(question, str(len(scene.cells_of(digit))), "how_many_of")


def _single_digits(scene: Scene) -> list[int]:
    return [digit for digit in scene.digits if len(scene.cells_of(digit)) == 1]


def can_ask_side(scene: Scene) -> bool:
    """Whether two digits stand alone of their kind, so that "left of" has one meaning."""
    return len(_single_digits(scene)) >= 2


def ask_side(scene: Scene, rng: random.Random) -> Turn:
    """Whether one digit stands left (or right) of another, by column; needs `can_ask_side`."""
    first, second = rng.sample(_single_digits(scene), 2)
    side = rng.choice(("left", "right"))
    step = scene.column(scene.cells_of(second)[0]) - scene.column(scene.cells_of(first)[0])
    holds = step > 0 if side == "left" else step < 0
    return Turn(f"Is the {first} {side} of the {second}?", "yes" if holds else "no", "left_right")


def ask_read_all(scene: Scene, rng: random.Random) -> Turn:
    """All digits in reading order."""
    question = rng.choice(("Read all digits in order.", "Read the digits row by row."))
    return Turn(question, ", ".join(str(digit) for digit in scene.digits), "read_all")


ASKERS: dict[str, Callable[[Scene, random.Random], Turn]] = {
    "digit_at": ask_digit_at,
    "where": ask_where,
    "how_many": ask_count,
    "how_many_of": ask_count_of,
    "left_right": ask_side,
    "read_all": ask_read_all,
}


def ask(scene: Scene, category: str, rng: random.Random) -> Turn | None:
    """A question of a category about a scene; None where the scene does not allow one."""
    if category == "left_right" and not can_ask_side(scene):
        return None
    return ASKERS[category](scene, rng)


def sample_turns(scene: Scene, num_turns: int, rng: random.Random) -> list[Turn]:
    """Up to `num_turns` questions of different categories."""
    categories = [name for name in ASKERS if name != "left_right" or can_ask_side(scene)]
    chosen = rng.sample(categories, min(num_turns, len(categories)))
    return [ASKERS[category](scene, rng) for category in chosen]


def text_only_turn(rng: random.Random) -> Turn:
    """A question that needs no picture."""
    digit = rng.randrange(10)
    word = NUMBER_WORDS[digit]
    kind = rng.randrange(4)
    if kind == 0:
        return Turn(f"How is {digit} written as a word?", word, "text_only")
    if kind == 1:
        return Turn(f"Which digit is called {word}?", str(digit), "text_only")
    if kind == 2:
        return Turn(f"What comes after {digit}?", str(digit + 1), "text_only")
    return Turn(f"What comes before {digit + 1}?", str(digit), "text_only")
