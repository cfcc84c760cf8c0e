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
    """Stage 2: every digit and where it stands, by place or by digit.

    Half go by place in reading order, empty places too; half go by digit in random order, so that
    what follows a digit has to be looked up in the picture.
    """
    if rng.random() < 0.5:
        shown = [
            f"{place}: {'empty' if digit is None else digit}"
            for place, digit in zip(scene.places, scene.cells, strict=True)
        ]
    else:
        digits = rng.sample(scene.digits, len(scene.digits))
        shown = [f"{digit} {scene.place_of(digit)}" for digit in digits]
    return ", ".join(shown) + "."


def ask_digit_at(scene: Scene, rng: random.Random) -> Turn:
    """Ask which digit stands at a named place."""
    cell = rng.randrange(len(scene.cells))
    digit = scene.cells[cell]
    place = scene.places[cell]
    question = rng.choice((f"Which digit is at the {place}?", f"What is at the {place}?"))
    return Turn(question, "empty" if digit is None else str(digit), "digit_at")


def ask_where(scene: Scene, rng: random.Random) -> Turn:
    """Ask where a digit stands."""
    digit = rng.choice(scene.digits)
    question = rng.choice((f"Where is the digit {digit}?", f"Where is the {digit}?"))
    return Turn(question, scene.place_of(digit), "where")


def ask_count(scene: Scene, rng: random.Random) -> Turn:
    """Ask how many digits there are."""
    question = rng.choice(("How many digits are there?", "How many digits do you see?"))
    return Turn(question, str(len(scene.digits)), "how_many")


def ask_presence(scene: Scene, rng: random.Random) -> Turn:
    """Ask whether a digit is there; as often one that is as one that is not."""
    absent = [digit for digit in range(10) if digit not in scene.digits]
    digit = rng.choice(scene.digits if rng.random() < 0.5 else absent)
    question = rng.choice((f"Is there a {digit}?", f"Do you see a {digit}?"))
    return Turn(question, "yes" if digit in scene.digits else "no", "is_there")


def can_ask_side(scene: Scene) -> bool:
    """True if two digits stand in different columns, so that one is left of the other."""
    return len({scene.column(scene.cell_of(digit)) for digit in scene.digits}) > 1


def ask_side(scene: Scene, rng: random.Random) -> Turn:
    """Ask whether one digit stands left (or right) of another; needs `can_ask_side`."""
    pairs = [
        (first, second)
        for first in scene.digits
        for second in scene.digits
        if scene.column(scene.cell_of(first)) != scene.column(scene.cell_of(second))
    ]
    first, second = rng.choice(pairs)
    side = rng.choice(("left", "right"))
    is_left = scene.column(scene.cell_of(first)) < scene.column(scene.cell_of(second))
    holds = is_left == (side == "left")
    return Turn(f"Is the {first} {side} of the {second}?", "yes" if holds else "no", "left_right")


def ask_read_all(scene: Scene, rng: random.Random) -> Turn:
    """All digits in reading order."""
    question = rng.choice(("Read all digits in order.", "Read the digits row by row."))
    return Turn(question, ", ".join(str(digit) for digit in scene.digits), "read_all")


ASKERS: dict[str, Callable[[Scene, random.Random], Turn]] = {
    "digit_at": ask_digit_at,
    "where": ask_where,
    "how_many": ask_count,
    "is_there": ask_presence,
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
