"""Answers as VQA-v2's public evaluator compares them: without punctuation, articles, number words.

The rules are those of its `vqaEval.py` (https://github.com/GT-Vision-Lab/VQA), oddities included,
since published numbers were made with them.
"""

import re
from collections.abc import Iterator

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The evaluator means to spare a point behind a digit, and spares those in front of one.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # it hands a flag of `re` over as the number of replacements
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}

# Not every contraction of English: `ill`, `were`, `well`, `shell`, `id` are left as they are.
_ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were "
    "wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something somebody there they where who you",
    "'s": "he how somebody someone that there what when where who why",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "": "ma'am o'clock y'all y'all'll 'twas 'ow's'at",
}


def _one_apostrophe_less(word: str) -> Iterator[str]:
    for place, character in enumerate(word):
        if character == "'":
            yield word[:place] + word[place + 1 :]


_CONTRACTIONS = {
    short: stem + ending
    for ending, stems in _ENDINGS.items()
    for stem in stems.split()
    for short in _one_apostrophe_less(stem + ending)
}


def normalised(answer: str) -> str:
    """Return an answer in the form in which equal ones are equal."""
    words = _without_punctuation(" ".join(re.split("[\n\t]", answer)).strip()).lower().split()
    kept = [word for word in (_DIGITS.get(word, word) for word in words) if word not in _ARTICLES]
    return " ".join(_CONTRACTIONS.get(word, word) for word in kept)


def _without_punctuation(text: str) -> str:
    """A mark beside a space is dropped everywhere, any other becomes a space; in a text that holds
    a number such as 1,000 all are dropped."""
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    changed = text
    for mark in _PUNCTUATION:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        changed = changed.replace(mark, "" if is_beside_space or has_number else " ")
    return _PERIOD.sub("", changed, count=_MOST_PERIODS)
