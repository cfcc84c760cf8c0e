"""How skipped samples are counted and reported."""

import logging

import pytest

from megatron_dattn.data.rejection import (
    VERBOSE_SKIPS,
    LoaderCounters,
    Reason,
    Rejection,
    as_counts,
    count_pack,
    from_counts,
)
from megatron_dattn.errors import DataError


def rejections(count: int) -> tuple[Rejection, ...]:
    return tuple(Rejection(f"k{i}", Reason.NO_ANSWER, "because") for i in range(count))


def test_reports_thin_out(caplog: pytest.LogCaptureFixture) -> None:
    counters = LoaderCounters()
    with caplog.at_level(logging.WARNING):
        count_pack(counters, 0, rejections(1000), fail=False)
    # 32, 64, 128, 256, 512 beyond the first twenty.
    assert len(caplog.messages) == VERBOSE_SKIPS + 5
    assert counters.skipped == {"no_answer": 1000}
    assert counters.num_skipped == 1000


def test_fail_names_the_first_sample() -> None:
    with pytest.raises(DataError, match=r"k0 .*no_answer.*because"):
        count_pack(LoaderCounters(), 0, rejections(2), fail=True)


def test_counts_travel_as_numbers() -> None:
    counters = LoaderCounters()
    count_pack(counters, 5, rejections(2), fail=False)
    seen, skipped = from_counts(as_counts(counters))
    assert seen == 7
    assert {reason: number for reason, number in skipped.items() if number} == counters.skipped
