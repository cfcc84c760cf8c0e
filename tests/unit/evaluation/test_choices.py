"""Which option an answer means, in the ways in which models say it."""

import pytest

from megatron_dattn.evaluation.choices import chosen_letter, options_of, right_letter

ANIMALS = {"A": "a dog", "B": "a cat", "C": "none of these"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" b ", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. a cat", "B"),
        ("b) a cat", "B"),
        ("A cat", "B"),
        ("a cat.", "B"),
        ("The answer is B.", "B"),
        ("Answer: (C)", "C"),
        ("I think the answer is B", "B"),
        ("the answer is A. No, the answer is B.", None),
        ("A big dog", None),
        ("D", None),
        ("", None),
        ("the answer is A dog I think", None),
    ],
)
def test_the_letter_of_an_answer(answer: str, letter: str | None) -> None:
    assert chosen_letter(answer, ANIMALS) == letter


def test_without_options_any_letter_may_be_meant() -> None:
    assert chosen_letter("D", {}) == "D"


def test_options_are_listed_or_stand_in_the_question() -> None:
    assert options_of(["a dog", "a cat", "none of these"], "what?") == ANIMALS
    assert options_of(None, "what?\nA. a dog\nB. a cat\n(C) none of these\nAnswer") == ANIMALS
    assert options_of(None, "What did A. Smith see?") == {}
    assert options_of(None, "what?\nB. a cat\nA. a dog") == {}


def test_the_right_option_is_given_as_letter_number_or_text() -> None:
    assert [right_letter(given, ANIMALS) for given in ("c", "2", "None of these", "D", "3")] == [
        "C",
        "C",
        "C",
        None,
        None,
    ]
    assert right_letter("B", {}) == "B"
    assert right_letter("2", {"A": "1", "B": "2", "C": "3"}) == "B"  # what the options say first
