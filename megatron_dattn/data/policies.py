"""What is done about each kind of problem: the run stops, the sample is skipped, or it is fixed.

Workers need to know only what they may fix; whether a sample that is left over ends the run is
decided where samples are counted (skipped_samples.py). So two sets say everything.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_dattn.data.problems import FIXED_BY_DEFAULT, LENGTH_PROBLEMS, PROBLEMS
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.errors import ConfigError

Policy = Literal["fail", "skip", "fix"]
Outcome = Literal["used", "fixed", "skipped", "failed"]


@dataclass(frozen=True)
class Policies:
    """The policies of a run, resolved."""

    fixing: frozenset[Reason] = FIXED_BY_DEFAULT
    """Problems that are fixed where their fix applies."""
    failing: frozenset[Reason] = frozenset()
    """Problems that end the run where they are not fixed."""

    @classmethod
    def of(
        cls, policies: Mapping[str, Policy], *, bad_samples: str, long_samples: str
    ) -> "Policies":
        """Resolve the settings `data.policies`, `data.bad_samples` and `data.long_samples`.

        Raises:
            ConfigError: a problem has no such name, or cannot be fixed.
        """
        fixing = set(FIXED_BY_DEFAULT)
        if long_samples == "truncate":
            fixing |= LENGTH_PROBLEMS
        failing = set(Reason) if bad_samples == "fail" else set()
        for name, policy in policies.items():
            reason = _settable(name)
            if policy == "fix":
                _require_fix(reason)
                fixing.add(reason)
                continue  # what its fix does not reach is left to data.bad_samples
            if reason not in LENGTH_PROBLEMS:
                fixing.discard(reason)
            (failing.add if policy == "fail" else failing.discard)(reason)
        return cls(frozenset(fixing), frozenset(failing))

    def outcome(self, rejected: Reason | None, fixed: Iterable[Reason]) -> Outcome:
        """Say what becomes of a sample.

        Args:
            rejected: the problem that the loader meets first; None if the sample can be used.
            fixed: the problems that were fixed.
        """
        if rejected is not None:
            return "failed" if rejected in self.failing else "skipped"
        return "fixed" if any(True for _ in fixed) else "used"


@dataclass
class Fixes:
    """What may be fixed in one sample, and what was."""

    allowed: frozenset[Reason]
    made: set[Reason] = field(default_factory=set)

    def settle(self, reason: Reason, message: str) -> None:
        """Note that a problem is fixed. Raises SampleError if it may not be."""
        if reason not in self.allowed:
            raise SampleError(reason, message)
        self.made.add(reason)


def _settable(name: str) -> Reason:
    if name in list(Reason):
        return Reason(name)
    if name in (problem.name for problem in PROBLEMS):
        raise ConfigError(
            f"data.policies.{name}: the loader sees one record at a time and cannot find it; "
            "tools/check_data.py does"
        )
    raise ConfigError(f"data.policies: there is no problem '{name}', but {', '.join(Reason)}")


def _require_fix(reason: Reason) -> None:
    if reason in LENGTH_PROBLEMS:
        raise ConfigError(f"data.policies.{reason}: its fix is data.long_samples: truncate")
    fixable = [
        problem.name for problem in PROBLEMS if problem.fix and problem.name not in LENGTH_PROBLEMS
    ]
    if reason not in fixable:
        raise ConfigError(
            f"data.policies.{reason}: there is no fix for it, but for {', '.join(fixable)}; use "
            "skip or fail"
        )
