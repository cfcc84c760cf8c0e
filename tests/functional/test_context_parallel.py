"""Whole runs from the entry script on two context-parallel ranks, against one process."""

import shutil
from typing import Any

import pytest

from megatron_dattn.checkpoint.files import step_folder_name
from megatron_dattn.training.sample_ledger import read_ledger
from tests.functional.workspace import Workspace, make_workspace, run_main
from tests.support.distributed import run_distributed
from tests.unit.training.test_event_file import points

STEPS = 4


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """With a run of one process."""
    workspace = make_workspace(tmp_path_factory.mktemp("workspace"), train_iters=STEPS)
    _train(workspace, "one", 1)
    return workspace


def _train(workspace: Workspace, run: str, ranks: int) -> None:
    """Train, save and validate on so many context-parallel ranks."""
    settings: dict[str, Any] = {"tensorboard_dir": workspace.folder / run / "tensorboard"}
    settings |= {"save_interval": 2, "eval_interval": 2, "context_parallel_size": ranks}
    endings = run_distributed(run_main, ranks, workspace.flags(run, **settings))
    assert [code for code, _ in endings] == [0] * ranks, endings


def _assert_as_one_process(workspace: Workspace, run: str) -> None:
    one, folder = workspace.folder / "one", workspace.folder / run
    expected, found = (points(path / "tensorboard") for path in (one, folder))
    for name in ("lm loss", "grad norm", "lm loss validation"):
        # fp32, with sums in another order; after some steps of AdamW.
        assert [step for step, _ in found[name]] == [step for step, _ in expected[name]]
        values = [value for _, value in expected[name]]
        assert [value for _, value in found[name]] == pytest.approx(values, rel=1e-4), name
    for name in ("throughput/text_tokens per s", "skipped/samples"):
        assert len(found[name]) == STEPS
    ledgers = [sorted((path / "ledger").iterdir()) for path in (one, folder)]
    assert [len(files) for files in ledgers] == [1, 1], "context-parallel ranks read the same data"
    assert read_ledger(ledgers[1][0]) == read_ledger(ledgers[0][0])


def test_two_ranks_train_as_one_process(workspace: Workspace) -> None:
    _train(workspace, "two", 2)
    _assert_as_one_process(workspace, "two")


def test_a_run_of_one_process_goes_on_with_two_ranks(workspace: Workspace) -> None:
    folder = workspace.folder / "grown"
    shutil.copytree(workspace.folder / "one", folder)
    shutil.rmtree(folder / step_folder_name(STEPS))
    (folder / "exit_reason.json").unlink()
    _train(workspace, "grown", 2)
    report = (folder / "resume_report.json").read_text()
    assert '"step": 2' in report
    assert "context 2" in report
    _assert_as_one_process(workspace, "grown")


def test_what_is_not_served_ends_at_once(workspace: Workspace) -> None:
    settings = {"context_parallel_size": 2, "attention": "s_attn"}
    endings = run_distributed(run_main, 2, workspace.flags("refused", **settings))
    assert [code for code, _ in endings] == [2, 2]
    assert "'s_attn'" in endings[0][1]
    assert "the nearest preset that it serves is 'ee_mllm'" in endings[0][1]
