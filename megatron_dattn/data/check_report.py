"""The findings about the files of a data set, as numbers, as a table and as JSON."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dattn.data.duplicates import ImageHashes
from megatron_dattn.data.encoder import SampleEncoder
from megatron_dattn.data.policies import Outcome
from megatron_dattn.data.problems import (
    DUPLICATE_ID,
    DUPLICATE_IMAGE,
    DUPLICATE_RECORD,
    PROBLEMS,
)
from megatron_dattn.data.rejection import Reason

MAX_EXAMPLES = 10  # per problem

_OUTCOMES: tuple[Outcome, ...] = ("fixed", "skipped", "failed")
_DUPLICATES = (DUPLICATE_ID, DUPLICATE_RECORD, DUPLICATE_IMAGE)
_NO_PAIRS = np.empty((0, 2), np.int64)
_PLACES = {problem.name: place for place, problem in enumerate(PROBLEMS)}


@dataclass(frozen=True)
class Finding:
    """One problem of one record."""

    problem: Reason
    message: str
    is_fixed: bool = False
    """Whether the record is used all the same, should it have no other problem."""
    image: str | None = None
    """The image that has it, as the record names it."""


@dataclass(frozen=True)
class RecordCheck:
    """What a check found of one record."""

    outcome: Outcome
    """What training would do with it."""
    findings: tuple[Finding, ...]
    """The one for which training would skip it comes before all others that are not fixed."""
    num_images: int
    text_tokens: int | None
    """None where it cannot be counted, or there is no tokenizer."""
    visual_tokens: int | None
    id_hash: int | None
    shown_id: str | None
    """The record's id, fit for a line of a report."""
    content_hash: int | None
    image_hashes: tuple[ImageHashes, ...] = ()
    """Of the images that can be used."""

    @property
    def rejections(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.is_fixed]


@dataclass(frozen=True)
class Example:
    """A record that has a problem."""

    number: int
    record: str
    """Its number and id in words."""
    message: str
    image: str | None = None


@dataclass
class ProblemCount:
    """How often a problem occurs."""

    count: int = 0
    """Occurrences: two images that are missing in a record are two."""
    records: Counter[Outcome] = field(default_factory=Counter)
    """Records that have it, by what training would do with them."""
    examples: list[Example] = field(default_factory=list)

    def add(self, example: Example) -> None:
        self.count += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(example)

    def as_dict(self) -> dict[str, Any]:
        examples = [{"record": each.record, "message": each.message} for each in self.examples]
        records = {outcome: self.records[outcome] for outcome in _OUTCOMES}
        return {"count": self.count, "records": records, "examples": examples}


@dataclass
class Report:
    """The findings about one file."""

    path: str
    image_root: Path
    text_budget: int | None = None
    visual_budget: int | None = None
    num_records: int = 0
    num_images: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    """Records that training would not use by the problem that it meets first, as it counts them."""
    fixed: Counter[str] = field(default_factory=Counter)
    """Records that it would use after a fix, by problem, as it counts them."""
    rejecting: Counter[str] = field(default_factory=Counter)
    """Occurrences of problems for which a record would not be used, be it not the first one."""
    problems: dict[str, ProblemCount] = field(default_factory=dict)
    duplicates: dict[str, ProblemCount] = field(
        default_factory=lambda: {name: ProblemCount() for name in _DUPLICATES}
    )
    repeats: dict[str, np.ndarray] = field(
        default_factory=lambda: dict.fromkeys(_DUPLICATES, _NO_PAIRS)
    )
    """By what they repeat, records with the first that is equal there, int64 [records, 2]."""
    text_tokens: Counter[int] = field(default_factory=Counter)
    """Records by their number of text tokens."""
    visual_tokens: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, path: str, image_root: Path, encoder: SampleEncoder | None) -> "Report":
        """An empty report with the budgets of an encoder."""
        if encoder is None:
            return cls(path, image_root)
        return cls(path, image_root, encoder.text_budget, encoder.visual_budget)

    def add(self, checked: RecordCheck) -> None:
        """Take the next record."""
        key = f"record {self.num_records}"
        if checked.shown_id is not None:
            key += f" (id {checked.shown_id})"
        number = self.num_records
        self.num_records += 1
        self.num_images += checked.num_images
        self.outcomes[checked.outcome] += 1
        for finding in checked.findings:
            count = self.problems.setdefault(str(finding.problem), ProblemCount())
            count.add(Example(number, key, finding.message, finding.image))
        for problem in {str(finding.problem) for finding in checked.findings}:
            self.problems[problem].records[checked.outcome] += 1
        self.rejecting.update(str(finding.problem) for finding in checked.rejections)
        if checked.rejections:
            self.skipped[str(checked.rejections[0].problem)] += 1
        else:
            self.fixed.update({str(finding.problem) for finding in checked.findings})
        if checked.text_tokens is not None:
            self.text_tokens[checked.text_tokens] += 1
        if checked.visual_tokens is not None:
            self.visual_tokens[checked.visual_tokens] += 1

    def add_duplicates(self, problem: str, pairs: Iterable[tuple[int, int]]) -> None:
        """Take the records that an earlier one equals in some way."""
        found = np.fromiter(pairs, np.dtype((np.int64, 2)))
        examples = [
            Example(number, f"record {number}", f"as record {first}")
            for number, first in found[:MAX_EXAMPLES].tolist()
        ]
        self.repeats[problem] = found
        self.duplicates[problem] = ProblemCount(len(found), examples=examples)

    @property
    def num_unused(self) -> int:
        return self.outcomes["skipped"] + self.outcomes["failed"]

    def has_problems(self, *, ignore_missing: bool) -> bool:
        """True if a record would not be used, apart from those whose images are missing if that is
        expected."""
        ignored = {str(Reason.MISSING_IMAGE)} if ignore_missing else set()
        return bool(set(self.rejecting) - ignored)

    def in_order(self) -> list[tuple[str, ProblemCount]]:
        """The problems that occur, the most frequent first."""
        return sorted(self.problems.items(), key=lambda item: (-item[1].count, _PLACES[item[0]]))

    def as_dict(self) -> dict[str, Any]:
        """For the JSON report."""
        return {
            "path": self.path,
            "records": self.num_records,
            "images": self.num_images,
            "bad_records": self.num_unused,
            "outcomes": {name: self.outcomes[name] for name in ("used", *_OUTCOMES)},
            "skipped": dict(self.skipped),
            "fixed": dict(self.fixed),
            "duplicate_ids": self.duplicates[DUPLICATE_ID].count,
            "duplicate_records": self.duplicates[DUPLICATE_RECORD].count,
            "duplicate_images": self.duplicates[DUPLICATE_IMAGE].count,
            "problems": {name: count.as_dict() for name, count in self.in_order()},
            "duplicates": {name: each.as_dict() for name, each in self.duplicates.items()},
            "text_tokens": _lengths(self.text_tokens, self.text_budget),
            "visual_tokens": _lengths(self.visual_tokens, self.visual_budget),
        }

    def table(self) -> str:
        """For people: one line per problem with its first example."""
        outcomes = self.outcomes
        lines = [
            f"{self.path}: {self.num_records} records, {self.num_images} images, "
            f"{self.num_unused} records with problems, {self.duplicates[DUPLICATE_ID].count} "
            f"repeated ids (harmless), {self.duplicates[DUPLICATE_RECORD].count} repeated records, "
            f"{self.duplicates[DUPLICATE_IMAGE].count} with an image of an earlier one",
            f"  training would use {outcomes['used'] + outcomes['fixed']} ({outcomes['fixed']} "
            f"after a fix), skip {outcomes['skipped']}, stop at {outcomes['failed']}",
        ]
        if self.problems:
            lines.append(
                f"  {'problem':<18} {'found':>8} {'fixed':>8} {'skipped':>8} {'stopped':>8}"
            )
        for name, count in self.in_order():
            numbers = (count.count, *(count.records[outcome] for outcome in _OUTCOMES))
            figures = " ".join(f"{number:>8}" for number in numbers)
            first = count.examples[0]
            lines.append(f"  {name:<18} {figures}   e.g. {first.record}: {first.message}")
        for what, lengths, budget in self.lengths():
            lines.append(f"  {what} of a record: {describe_lengths(lengths, budget)}")
        return "\n".join(lines)

    def lengths(self) -> list[tuple[str, Counter[int], int]]:
        """Measured lengths: their name, the records by length, and the budget of a pack."""
        measured = [
            ("text tokens", self.text_tokens, self.text_budget),
            ("visual tokens", self.visual_tokens, self.visual_budget),
        ]
        return [(what, lengths, budget) for what, lengths, budget in measured if lengths and budget]


def describe_lengths(lengths: Counter[int], budget: int) -> str:
    """Figures of a distribution in one line."""
    figures = _lengths(lengths, budget)
    return (
        "mean {mean:.0f}, median {median}, 99 % up to {p99}, longest {longest}; budget {budget}, "
        "exceeded by {over_budget}"
    ).format_map(figures)


def _lengths(lengths: Counter[int], budget: int | None) -> dict[str, Any]:
    total = lengths.total()
    if total == 0:
        return {"budget": budget, "records": 0}
    return {
        "budget": budget,
        "records": total,
        "mean": sum(length * number for length, number in lengths.items()) / total,
        "median": _quantile(lengths, 0.5),
        "p99": _quantile(lengths, 0.99),
        "longest": max(lengths),
        "over_budget": sum(n for length, n in lengths.items() if budget and length > budget),
    }


def _quantile(lengths: Counter[int], share: float) -> int:
    """The least length that no more than the rest of the records exceed."""
    left = share * lengths.total()
    for length in sorted(lengths):
        left -= lengths[length]
        if left <= 0:
            break
    return length
