"""How skipped samples are counted and reported, and when they stop a run: seldom by chance, soon in
earnest, and always in the end.
"""

import logging
import random

import numpy as np
import pytest

from megatron_dattn.data.rejection import Reason, Rejection
from megatron_dattn.data.skipped_samples import (
    VERBOSE_SKIPS,
    LoaderCounters,
    RecentSamples,
    as_counts,
    check_share,
    count_pack,
    exceeds,
    from_counts,
    most_in_a_row,
)
from megatron_dattn.errors import DataError


def rejections(count: int) -> tuple[Rejection, ...]:
    return tuple(Rejection(f"k{i}", Reason.NO_ANSWER, "because") for i in range(count))


def test_reports_thin_out(caplog: pytest.LogCaptureFixture) -> None:
    counters = LoaderCounters()
    with caplog.at_level(logging.WARNING):
        count_pack(counters, 0, rejections(1000))
    # 32, 64, 128, 256, 512 beyond the first twenty.
    assert len(caplog.messages) == VERBOSE_SKIPS + 5
    assert counters.skipped == {"no_answer": 1000}
    assert counters.num_skipped == 1000


def test_fail_names_the_first_sample() -> None:
    with pytest.raises(DataError, match=r"k0 .*no_answer.*because"):
        count_pack(LoaderCounters(), 0, rejections(2), failing={Reason.NO_ANSWER})


def test_counts_travel_as_numbers() -> None:
    counters = LoaderCounters()
    fixed = (Reason.EMPTY_ANSWER, Reason.ANIMATED_IMAGE, Reason.ANIMATED_IMAGE)
    count_pack(counters, 5, rejections(2), fixed, failing={Reason.BAD_RECORD})
    assert from_counts(as_counts(counters)) == counters
    assert counters == LoaderCounters(7, {"no_answer": 2}, {"empty_answer": 1, "animated_image": 2})


LIMIT = 0.1


def first_stop(num_bad_of: tuple[int, int], limit: float = LIMIT) -> int:
    """Samples after which a run stops if the bad ones are spread evenly."""
    bad, total = num_bad_of
    return next(seen for seen in range(1, 20_000) if exceeds(seen * bad // total, seen, limit))


def test_small_cases_are_decided_like_this() -> None:
    assert first_stop((1, 1)) == 7
    assert first_stop((1, 2)) == 32
    assert 350 < first_stop((1, 5)) < 450
    assert 5000 < first_stop((1, 8)) < 6500
    assert first_stop((1, 1), 0.5) == 24


@pytest.mark.parametrize("seen", [1, 10, 100, 10_000, 10**9])
def test_the_limit_itself_is_allowed(seen: int) -> None:
    assert not exceeds(seen // 10, seen, LIMIT)
    assert not exceeds(seen, seen, 1.0)
    assert not exceeds(0, seen, 0.0)
    assert exceeds(1, seen, 0.0)


def test_a_share_at_the_limit_does_not_stop_by_chance() -> None:
    """Judged after every sample of 50 runs; a plain comparison would stop nearly all."""
    draw = random.Random(1)
    compared = stopped = 0
    for _ in range(50):
        bad, above = 0, False
        for seen in range(1, 4001):
            bad += draw.random() < LIMIT
            above |= bad > LIMIT * seen
            stopped += exceeds(bad, seen, LIMIT)
        compared += above
    assert compared > 40
    assert stopped == 0


def test_ranks_that_give_up() -> None:
    """A rank whose data are as bad as the limit allows meets that many in a row by 1e-12."""
    for limit in (0.0, 0.1, 0.75):
        assert most_in_a_row(limit) == 100
    assert 0.9 ** most_in_a_row(0.9) < 1e-12 < 0.9 ** (most_in_a_row(0.9) - 2)
    assert most_in_a_row(0.9999) == most_in_a_row(1.0) == 10_000


def test_the_message_has_the_whole_count() -> None:
    skipped = {"bad_record": 0, "odd_roles": 3, "missing_image": 40}
    check_share(skipped, 430, LIMIT)  # exactly the limit
    check_share(skipped, 300, LIMIT)  # a little more, which may be chance
    with pytest.raises(DataError, match=r"^43 of 100 .*\(missing_image 40, odd_roles 3\).* 0\.1 "):
        check_share(skipped, 100, LIMIT)


GOOD = 1_000_000


def samples_until_stop(share: float, *, step: int, limit: float = LIMIT) -> int:
    """How many samples of which that share is bad follow a million good ones."""
    recent = RecentSamples(limit)
    for seen in range(GOOD * 3 // 4 // step * step, GOOD + 1, step):  # longer than any window
        recent.check({"missing_image": 0}, seen)
    seen = start = GOOD // step * step
    while True:
        seen += step
        bad = round(share * (seen - start))
        assert seen < start + 10**6
        try:
            recent.check({"missing_image": bad}, seen)
        except DataError:
            assert not exceeds(bad, seen, limit)
            return seen - start


@pytest.mark.parametrize("step", [8, 300, 4096])
def test_an_outage_after_a_million_good_samples_stops_the_run_soon(step: int) -> None:
    assert samples_until_stop(1.0, step=step) <= max(300, step)
    assert samples_until_stop(0.9, step=step) <= max(350, step)
    # Not even twice what is allowed; and half of the data where a good half of it is.
    assert samples_until_stop(0.18, step=step) < 3000 + step
    assert samples_until_stop(0.15, step=step) < 13_000 + step
    assert samples_until_stop(1.0, step=step, limit=0.5) < 1500 + step


def test_an_outage_after_a_resume_stops_the_run_as_soon() -> None:
    """The windows of a new process know of nothing but the counters' first values."""
    recent = RecentSamples(LIMIT)
    recent.check({"missing_image": 8}, GOOD + 8)
    recent.check({"missing_image": 16}, GOOD + 16)
    with pytest.raises(DataError, match=r"^16 of the last 16 .* but 24 of 1000024 in the whole"):
        recent.check({"missing_image": 24}, GOOD + 24)


def test_a_steady_share_at_the_limit_never_stops_the_run() -> None:
    """Two million samples by chance, and as many dealt out evenly."""
    for limit in (0.01, LIMIT, 0.5):
        recent, spread = RecentSamples(limit), RecentSamples(limit)
        drawn = np.random.default_rng(3).binomial(48, limit, size=40_000).cumsum()
        for steps, bad in enumerate(drawn.tolist(), start=1):
            recent.check({"bad_record": bad}, 48 * steps)
            spread.check({"bad_record": int(48 * steps * limit)}, 48 * steps)


def test_limits_without_a_margin_hold_in_windows() -> None:
    none, everything = RecentSamples(0.0), RecentSamples(1.0)
    for seen in range(8, 4000, 8):
        none.check({"bad_record": 0}, seen)
        everything.check({"bad_record": seen}, seen)
    with pytest.raises(DataError, match="1 of the last"):
        none.check({"bad_record": 1}, 4000)
