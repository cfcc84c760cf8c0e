"""A run that is killed at random times ends as the one that nobody touched: a short version.

`python -m benchmarks.kill_and_resume` does it a hundred times.
"""

import json

import pytest

from benchmarks.kill_and_resume import Project, differences, kill_at_random
from tests.functional.workspace import make_workspace, run_main
from tests.support.distributed import run_distributed

KILLS, STEPS, RECORDS = 2, 60, 40


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """With both runs done; both kills are of the kinds that strike while it trains."""
    folder = tmp_path_factory.mktemp("project")
    make_workspace(folder, train_iters=STEPS)
    project = Project(folder, STEPS, RECORDS, ("--num-workers", "1"))
    assert run_distributed(run_main, 1, project.flags("untouched")) == [(0, "")]
    kills = kill_at_random(project, "killed", KILLS, seed=1, most_seconds=0.5)
    assert kills.by_target == {"trainer": 1, "loader process": 1}
    assert kills.exit_codes == {1: 1}
    assert run_distributed(run_main, 1, project.flags("killed")) == [(0, "")]
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
