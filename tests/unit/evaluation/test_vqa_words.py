"""VQA-v2's normalisation, on cases worked out by hand from its evaluator's rules."""

import pytest

from megatron_dattn.evaluation.vqa_words import normalised


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The two dogs", "2 dogs"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("an\tapple\n", "apple"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),  # an apostrophe may be forgotten, not two
        ("couldnt've", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("were well", "were well"),  # words of their own
        ("Yes!", "yes"),
        ("red/white", "red white"),
        ("red, white", "red white"),
        ("red ,white-blue", "red white blue"),
        ("1,000 - 2,000", "1000 2000"),
        ("1,000-2", "10002"),
        ("3.5", "3.5"),
        ("mr. x.", "mr x"),
        ("5.", "5"),
        (".5", ".5"),
        ("it's", "it's"),
        ("", ""),
    ],
)
def test_answers_take_the_form_of_the_public_evaluator(answer: str, expected: str) -> None:
    assert normalised(answer) == expected


def test_what_is_normalised_stays_as_it_is() -> None:
    for answer in ("don't know", "2 dogs", "mr x", "10000"):
        assert normalised(answer) == answer
