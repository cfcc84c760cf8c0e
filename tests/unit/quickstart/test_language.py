"""Everything that is said about a scene is true."""

import random
import re
from collections import Counter

import pytest

from examples.quickstart.language import (
    ASKERS,
    ask,
    can_ask_side,
    dense_caption,
    join_words,
    sample_turns,
    short_caption,
    text_only_turn,
)
from examples.quickstart.scenes import Scene, sample_scene
from tests.unit.quickstart import oracle

GRIDS = (2, 3)


def scenes(grid: int, count: int = 200) -> list[Scene]:
    rng = random.Random(7)
    return [sample_scene(rng, grid) for _ in range(count)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("category", ASKERS)
def test_answers_are_right(grid: int, category: str) -> None:
    rng = random.Random(1)
    asked = 0
    for scene in scenes(grid):
        turn = ask(scene, category, rng)
        assert (turn is None) == (category == "left_right" and not can_ask_side(scene))
        if turn is not None:
            board = oracle.board_of(grid, scene.cells)
            assert turn.answer == oracle.answer(board, turn.question), (scene, turn)
            assert turn.category == category
            asked += 1
    assert asked > 50


@pytest.mark.parametrize("grid", GRIDS)
def test_dense_captions_tell_every_cell(grid: int) -> None:
    rng = random.Random(2)
    for scene in scenes(grid):
        told = oracle.read_dense_caption(grid, dense_caption(scene, rng))
        assert told == oracle.places(oracle.board_of(grid, scene.cells))


def test_short_captions_list_the_digits() -> None:
    rng = random.Random(3)
    for scene in scenes(2):
        caption = short_caption(scene, rng)
        assert [int(digit) for digit in re.findall(r"\d", caption)] == scene.digits
        if ":" in caption:
            assert caption.startswith(oracle.WORDS[len(scene.digits)])


def test_text_only_answers_are_right() -> None:
    rng = random.Random(4)
    for _ in range(300):
        turn = text_only_turn(rng)
        assert turn.answer == oracle.text_answer(turn.question)


@pytest.mark.parametrize("category", ["digit_at", "where", "is_there", "left_right"])
def test_no_answer_dominates(category: str) -> None:
    """A question is worth asking only if always saying the same thing does not answer it."""
    rng = random.Random(5)
    turns = [ask(scene, category, rng) for scene in scenes(2, 600)]
    answers = Counter(turn.answer for turn in turns if turn is not None)
    assert answers.most_common(1)[0][1] < 0.75 * answers.total()
    assert len(answers) >= 2


def test_turns_of_one_conversation_differ_in_category() -> None:
    rng = random.Random(6)
    for scene in scenes(2):
        turns = sample_turns(scene, 4, rng)
        assert len({turn.category for turn in turns}) == len(turns) == 4


def test_join_words() -> None:
    assert join_words(["a"]) == "a"
    assert join_words(["a", "b"]) == "a and b"
    assert join_words(["a", "b", "c"]) == "a, b and c"
