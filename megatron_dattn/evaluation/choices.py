"""Multiple choice: which options a question offers, and which of them an answer means."""

import re
from collections.abc import Mapping
from string import ascii_uppercase

# "B", "(b)", "B.", "B. a dog", "[B] a dog"; but not "A dog".
_LETTER_FIRST = re.compile(r"\s*[(\[]?([A-Za-z])(?:[)\].:]|\s*$)")
# "The answer is B.", "Answer: (B)", "option B"; but not "the answer is A dog".
_LETTER_NAMED = re.compile(
    r"\b(?i:answer|option|choice)(?i: is)?:? *[(\[]?([A-Z])(?=[)\].,:]|\s*$)"
)
_OPTION_LINE = re.compile(r"^\s*[(\[]?([A-Z])[)\].:]\s*(\S.*?)\s*$", re.M)


def options_of(texts: object, question: str) -> dict[str, str]:
    """Texts by letter: those of a record's list, or lines `A. ...`, `B. ...` of the question.

    Args:
        texts: a list of texts; None where the record has none.
    """
    if isinstance(texts, list) and len(texts) <= len(ascii_uppercase):
        return dict(zip(ascii_uppercase, map(str, texts), strict=False))
    found = dict(_OPTION_LINE.findall(question))
    in_order = list(found) == list(ascii_uppercase[: len(found)])
    return found if in_order and len(found) > 1 else {}


def chosen_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that an answer means; None where it is none, or not only one.

    An answer begins with the letter, is one option's whole text, or says `the answer is B`.

    Args:
        options: texts by letter; empty where they are not known.
    """
    first = _LETTER_FIRST.match(answer)
    if first and _is_offered(first[1].upper(), options):
        return first[1].upper()
    same = [letter for letter, text in options.items() if plain(text) == plain(answer)]
    if len(same) == 1:
        return same[0]
    named = {letter for letter in _LETTER_NAMED.findall(answer) if _is_offered(letter, options)}
    return named.pop() if len(named) == 1 else None


def right_letter(expected: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that a data set gives: as such, as an option's number, or as its text."""
    if len(expected) == 1 and _is_offered(expected.upper(), options):
        return expected.upper()
    same = [letter for letter, text in options.items() if plain(text) == plain(expected)]
    if len(same) == 1:
        return same[0]
    if expected.isdecimal() and int(expected) < len(options):
        return ascii_uppercase[int(expected)]
    return None


def _is_offered(letter: str, options: Mapping[str, str]) -> bool:
    return letter in options if options else letter in ascii_uppercase


def plain(text: str) -> str:
    """Return a text without what does not count: case, white space, full stops at the end."""
    return " ".join(text.casefold().split()).rstrip(".")
