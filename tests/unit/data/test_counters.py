"""When skipped samples stop a run, and how they are reported."""

import logging

import pytest

from megatron_dattn.data.counters import MIN_SEEN, VERBOSE_SKIPS, LoaderCounters, SkipPolicy
from megatron_dattn.data.rejection import Reason, Rejection
from megatron_dattn.errors import DataError


def rejections(count: int) -> tuple[Rejection, ...]:
    return tuple(Rejection(f"k{i}", Reason.NO_ANSWER, "because") for i in range(count))


def test_the_share_is_judged_after_enough_samples() -> None:
    policy, counters = SkipPolicy(fail=False, max_fraction=0.1), LoaderCounters()
    policy.count(counters, 0, rejections(11))
    policy.count(counters, MIN_SEEN - 12, ())
    with pytest.raises(DataError, match=r"11 of 100 samples .*no_answer 11.*0\.1"):
        policy.count(counters, 1, ())
    policy.count(counters, 10, ())  # 11 of 110 is exactly the share that is allowed


def test_reports_thin_out(caplog: pytest.LogCaptureFixture) -> None:
    policy, counters = SkipPolicy(fail=False, max_fraction=1.0), LoaderCounters()
    with caplog.at_level(logging.WARNING):
        policy.count(counters, 0, rejections(1000))
    # 32, 64, 128, 256, 512 beyond the first twenty.
    assert len(caplog.messages) == VERBOSE_SKIPS + 5
    assert counters.skipped == {"no_answer": 1000}
    assert counters.num_skipped == 1000


def test_fail_names_the_first_sample() -> None:
    with pytest.raises(DataError, match=r"k0 .*no_answer.*because"):
        SkipPolicy(fail=True, max_fraction=1.0).count(LoaderCounters(), 0, rejections(2))
