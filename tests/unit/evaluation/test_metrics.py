"""Scores of single answers, on cases worked out by hand from the public scorers' rules."""

import pytest

from megatron_dattn.errors import ConfigError
from megatron_dattn.evaluation.metrics import METRICS, edit_distance, metric_of


def score(metric: str, answer: str, *expected: str) -> float:
    return METRICS[metric].score(answer, expected, {})


def test_exact_match_knows_neither_case_nor_a_full_stop() -> None:
    assert score("exact", "  A  Dog. ", "a cat", "a dog") == 1
    assert score("exact", "dog", "a dog") == 0


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("95", "100", 1),
        ("105", "100", 1),
        ("94.9", "100", 0),
        ("-95", "100", 0),
        ("-95", "-100", 1),
        ("26%", "25%", 1),
        ("0.26", "25%", 1),
        ("26", "25%", 0),
        ("0.01", "0", 0),
        ("0", "0", 1),
        ("0.0", "0", 0),  # of zero nothing is 5 %, so the text decides
        ("Yes", "yes", 1),
        ("2019 ", "2019", 1),
        ("about 100", "100", 0),
        ("nan", "100", 0),
    ],
)
def test_relaxed_accuracy_is_charts(answer: str, right: str, expected: float) -> None:
    assert score("relaxed", answer, right) == expected


@pytest.mark.parametrize(
    ("agreeing", "expected"),
    # With k of ten people: (k * min(1, (k - 1) / 3) + (10 - k) * min(1, k / 3)) / 10.
    [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)],
)
def test_vqa_accuracy_leaves_every_person_out_once(agreeing: int, expected: float) -> None:
    people = ["The two"] * agreeing + ["other"] * (10 - agreeing)
    assert score("vqa", "2", *people) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("Hello  World", "hello world", 1 - 0 / 12),
        ("hello wrld", "hello world", 1 - 1 / 11),
        ("abcd", "abxy", 0.5),  # exactly one half counts
        ("abcd", "axyz", 0),
        ("", "x", 0),
    ],
)
def test_anls_of_documents(answer: str, right: str, expected: float) -> None:
    assert score("anls", answer, "quite another", right) == pytest.approx(expected)


def test_edit_distance() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("abc", "abc") == 0


def test_choice_compares_letters() -> None:
    options = {"A": "a dog", "B": "a cat"}
    assert METRICS["choice"].score("B. a cat", ["1"], options) == 1
    assert METRICS["choice"].score("A", ["B"], options) == 0
    assert METRICS["choice"].score("no idea", ["B"], options) == 0


def test_captions_are_compared_by_their_longest_common_subsequence() -> None:
    assert score("caption", "A dog runs.", "a dog runs") == pytest.approx(1)
    # Common: "a dog", 2 of 3 words said and 2 of 4 of the reference.
    precision, recall, beta = 2 / 3, 2 / 4, 1.44
    expected = (1 + beta) * precision * recall / (recall + beta * precision)
    assert score("caption", "a dog runs", "a big dog sleeps") == pytest.approx(expected)
    assert score("caption", "runs dog a", "a dog runs") == pytest.approx(1 / 3)
    assert score("caption", "...", "a dog") == 0
    assert score("caption", "cat", "a dog") == 0


def test_an_unknown_metric_is_named_with_its_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"no metric 'captoin'.*the nearest is caption"):
        metric_of("captoin")
