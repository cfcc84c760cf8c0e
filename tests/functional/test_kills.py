"""A run that is killed at random times ends as the one that nobody touched: a short version.

`python -m benchmarks.kill_and_resume` does it a hundred times.
"""

import json

import pytest

from benchmarks.kill_and_resume import (
    Project,
    differences,
    kill_at_random,
    make_project,
    run_to_the_end,
)

KILLS = 2


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """With both runs done."""
    project = make_project(tmp_path_factory.mktemp("project"), steps=40, num_images=8)
    run_to_the_end(project, "untouched")
    kills = kill_at_random(project, "killed", KILLS, seed=3)
    assert kills.by_target.total() == KILLS, "the run was over before it was killed"
    assert set(kills.exit_codes) <= {1}
    run_to_the_end(project, "killed")
    return project


def test_a_killed_run_equals_the_untouched_one(project: Project) -> None:
    assert differences(project, "killed", "untouched") == []


def test_a_sample_that_was_lost_would_be_noticed(project: Project) -> None:
    path = project.folder / "killed" / "ledger" / "samples-dp00000.jsonl"
    lines = path.read_text().splitlines()
    changed = json.loads(lines[3])
    changed["packs"][0][0] = changed["packs"][0][1]
    path.write_text("\n".join([*lines[:3], json.dumps(changed), *lines[4:]]) + "\n")
    wrong = differences(project, "killed", "untouched")
    assert any("ledgers differ in steps [4]" in line for line in wrong)
    assert any("epoch" in line for line in wrong)
