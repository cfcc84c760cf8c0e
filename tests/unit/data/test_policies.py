"""What a run does about each problem follows from three settings, and nonsense is refused."""

from pathlib import Path

import pytest

from megatron_dattn.config.cli import load_config, parse_command_line
from megatron_dattn.data.config import DataConfig
from megatron_dattn.data.policies import Fixes, Policies
from megatron_dattn.data.problems import FIXED_BY_DEFAULT, LENGTH_PROBLEMS, PROBLEMS
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.errors import ConfigError


def resolved(**settings) -> Policies:
    return DataConfig(**settings).resolved_policies


def test_without_settings_what_is_harmless_is_fixed_and_nothing_ends_the_run() -> None:
    assert resolved() == Policies(FIXED_BY_DEFAULT, frozenset())
    assert {"leading_answer", "animated_image"} < FIXED_BY_DEFAULT


def test_bad_samples_fail_is_the_policy_of_all_that_is_not_fixed() -> None:
    policies = resolved(bad_samples="fail", policies={"missing_image": "skip"})
    assert policies.failing == set(Reason) - {Reason.MISSING_IMAGE}
    assert policies.fixing == FIXED_BY_DEFAULT
    assert policies.outcome(Reason.BROKEN_IMAGE, ()) == "failed"
    assert policies.outcome(Reason.MISSING_IMAGE, ()) == "skipped"
    assert policies.outcome(None, [Reason.ANIMATED_IMAGE]) == "fixed"
    assert policies.outcome(None, []) == "used"


def test_a_policy_goes_before_the_default() -> None:
    policies = resolved(
        policies={"animated_image": "skip", "cmyk_image": "fail", "empty_answer": "fix"}
    )
    assert policies.failing == {Reason.CMYK_IMAGE}
    assert policies.fixing == FIXED_BY_DEFAULT - {"animated_image", "cmyk_image"} | {"empty_answer"}


def test_cutting_is_the_fix_of_what_is_too_long() -> None:
    assert resolved(long_samples="truncate").fixing > LENGTH_PROBLEMS
    # What cannot be cut is left to the policy.
    policies = resolved(long_samples="truncate", policies={"too_much_text": "fail"})
    assert policies.fixing > LENGTH_PROBLEMS
    assert policies.failing == {Reason.TOO_MUCH_TEXT}


@pytest.mark.parametrize(
    ("policies", "words"),
    [
        ({"broken_image": "fix"}, r"no fix for it, but for odd_roles, .*; use skip or fail"),
        ({"too_much_text": "fix"}, r"its fix is data\.long_samples: truncate"),
        ({"duplicate_record": "skip"}, r"check_data\.py does"),
        ({"missing": "skip"}, r"no problem 'missing', but bad_record, .*missing_image"),
    ],
)
def test_what_cannot_be_done_is_refused_at_the_start(policies: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DataConfig(policies=policies)


def test_exactly_what_has_a_fix_can_be_fixed() -> None:
    for problem in PROBLEMS:
        if problem.checked_only or problem.name in LENGTH_PROBLEMS:
            continue
        try:
            fixing = resolved(policies={problem.name: "fix"}).fixing
        except ConfigError:
            assert problem.fix is None
        else:
            assert problem.fix
            assert problem.name in fixing


def test_policies_come_from_files_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("data:\n  policies: {missing_image: fail, empty_answer: fix}\n")
    assert load_config(path).data.policies == {"missing_image": "fail", "empty_answer": "fix"}
    parsed = parse_command_line(
        ["--config", str(path), "--data.policies.missing_image", "skip"]
    ).config.data
    assert parsed.policies == {"missing_image": "skip", "empty_answer": "fix"}
    inline = ["--policies", "{missing_image: fail}"]
    assert parse_command_line(inline).config.data.policies == {"missing_image": "fail"}
    path.write_text("data:\n  policies:\n")
    assert load_config(path).data.resolved_policies == Policies()
    for wrong, words in (
        ("{missing_image: drop}", "drop"),
        ("skip", "expected a mapping"),
        ("[missing_image]", "dict"),
    ):
        path.write_text(f"data:\n  policies: {wrong}\n")
        with pytest.raises(ConfigError, match=words):
            load_config(path)


def test_fixes_are_noted_or_refused() -> None:
    fixes = Fixes(frozenset([Reason.EMPTY_ANSWER]))
    fixes.settle(Reason.EMPTY_ANSWER, "x")
    assert fixes.made == {Reason.EMPTY_ANSWER}
    with pytest.raises(SampleError, match="y") as caught:
        fixes.settle(Reason.NO_ANSWER, "y")
    assert caught.value.reason == Reason.NO_ANSWER
