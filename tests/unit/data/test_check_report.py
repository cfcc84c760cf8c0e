"""A report counts as the loader does, and describes lengths."""

from collections import Counter
from pathlib import Path

from megatron_dattn.data.check_report import Finding, RecordCheck, Report, describe_lengths
from megatron_dattn.data.policies import Outcome
from megatron_dattn.data.problems import DUPLICATE_ID, DUPLICATE_RECORD
from megatron_dattn.data.rejection import Reason

MISSING = Finding(Reason.MISSING_IMAGE, "gone", image="a.png")
EMPTY = Finding(Reason.EMPTY_ANSWER, "empty")
FIRST_FRAME = Finding(Reason.ANIMATED_IMAGE, "first frame", is_fixed=True, image="b.gif")


def checked(outcome: Outcome, *findings: Finding) -> RecordCheck:
    return RecordCheck(outcome, findings, 1, 10, 4, None, "'r'", 1)


def report_of(*records: RecordCheck) -> Report:
    report = Report("set.json", Path(), text_budget=64, visual_budget=16)
    for record in records:
        report.add(record)
    return report


def test_training_counts_a_record_by_its_first_problem_and_fixes_of_used_records_only() -> None:
    report = report_of(
        checked("used"),
        checked("skipped", EMPTY, MISSING, MISSING, FIRST_FRAME),
        checked("fixed", FIRST_FRAME, FIRST_FRAME),
        checked("failed", MISSING),
    )
    assert report.outcomes == {"used": 1, "skipped": 1, "fixed": 1, "failed": 1}
    assert report.skipped == {"empty_answer": 1, "missing_image": 1}
    assert report.fixed == {"animated_image": 1}
    figures = report.as_dict()
    assert figures["bad_records"] == 2
    missing = figures["problems"]["missing_image"]
    assert missing["count"] == 3
    assert missing["records"] == {"fixed": 0, "skipped": 1, "failed": 1}
    assert missing["examples"][0] == {"record": "record 1 (id 'r')", "message": "gone"}
    table = report.table()
    assert "training would use 2 (1 after a fix), skip 1, stop at 1" in table
    assert "missing_image             3        0        1        1   e.g. record 1" in table


def test_missing_images_may_be_expected_and_fixes_are_no_problem() -> None:
    assert not report_of(checked("fixed", FIRST_FRAME)).has_problems(ignore_missing=False)
    missing = report_of(checked("skipped", MISSING))
    assert missing.has_problems(ignore_missing=False)
    assert not missing.has_problems(ignore_missing=True)
    both = report_of(checked("skipped", MISSING, EMPTY))
    assert both.has_problems(ignore_missing=True)


def test_duplicates() -> None:
    report = report_of(checked("used"), checked("used"))
    report.add_duplicates(DUPLICATE_ID, [])
    report.add_duplicates(DUPLICATE_RECORD, [(1, 0)])
    assert report.repeats[DUPLICATE_RECORD].tolist() == [[1, 0]]
    assert report.repeats[DUPLICATE_ID].tolist() == []
    assert report.as_dict()["duplicate_records"] == 1
    assert "0 repeated ids (harmless), 1 repeated records, 0 with an image of" in report.table()


def test_lengths_are_described() -> None:
    lengths = Counter({10: 98, 50: 1, 200: 1})
    assert describe_lengths(lengths, 64) == (
        "mean 12, median 10, 99 % up to 50, longest 200; budget 64, exceeded by 1"
    )
    assert Report("set.json", Path()).lengths() == []
