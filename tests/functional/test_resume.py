"""Runs that are stopped or killed and started again equal the one that nobody touched, bitwise."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_dattn.checkpoint import find_checkpoint
from megatron_dattn.checkpoint.load import read_common
from megatron_dattn.training.ledger import read_ledger
from tests.functional.workspace import Workspace, make_workspace, pretrain, start_pretraining

TRAIN_ITERS = 12
RANKS = 2
TIMEOUT = 240.0


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """With a short stage 1, from whose weights every run of these tests starts stage 2."""
    workspace = make_workspace(tmp_path_factory.mktemp("workspace"), train_iters=TRAIN_ITERS)
    done = pretrain(workspace.flags("stage1", train_iters=1))
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace


def _stage_two(workspace: Workspace, run: str, save_interval: int) -> list[str]:
    load = workspace.folder / "stage1"
    return workspace.flags(run, stage="stage2", load=load, save_interval=save_interval)


@pytest.fixture(scope="module")
def untouched(workspace: Workspace) -> Path:
    """The run folder of an uninterrupted run."""
    done = pretrain(_stage_two(workspace, "untouched", 3), ranks=RANKS)
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace.folder / "untouched"


def _final_state(folder: Path) -> dict[str, Any]:
    """Everything that the checkpoint of the last step holds.

    Weights, moments and the loaders' places as hashes of their files; what is pickled by value, as
    equal values need not give equal bytes there.
    """
    found = find_checkpoint(folder)
    assert found is not None
    assert found.step == TRAIN_ITERS
    state: dict[str, Any] = {"common": read_common(found.path)}
    for name, record in found.manifest.files.items():
        if name.endswith(".distcp") or name.startswith("loader-"):
            state[name] = record.sha256
        elif name.startswith("rng-"):
            state[name] = torch.load(found.path / name, weights_only=True)
    per_rank = {f"{kind}-{rank:05d}" for kind in ("loader-dp", "rng") for rank in range(RANKS)}
    assert {name.split(".")[0] for name in state} == {"common", "__0_0", *per_rank}
    return state


def _assert_same(found: Any, expected: Any, where: str = "") -> None:
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            _assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, (item, other) in enumerate(zip(found, expected, strict=True)):
            _assert_same(item, other, f"{where}/{index}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


def _ledgers(folder: Path) -> list[dict]:
    return [read_ledger(path) for path in sorted((folder / "ledger").iterdir())]


def _wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def _steps_done(folder: Path) -> int:
    path = folder / "ledger" / "samples-dp00001.jsonl"
    return max(read_ledger(path), default=0) if path.exists() else 0


def _rank_processes(launcher: int) -> dict[int, psutil.Process]:
    """Processes of the training script below a launcher, by rank."""
    found = {}
    for process in psutil.Process(launcher).children(recursive=True):
        if any("pretrain_vlm.py" in word for word in process.cmdline()):
            found[int(process.environ()["RANK"])] = process
    return found


def _assert_equal_runs(folder: Path, untouched: Path) -> None:
    assert _ledgers(folder) == _ledgers(untouched)
    _assert_same(_final_state(folder), _final_state(untouched))


def test_an_untouched_run(untouched: Path) -> None:
    note = json.loads((untouched / "exit_reason.json").read_text())
    assert note == {"reason": "finished", "step": TRAIN_ITERS, "detail": "", "exit_code": 0}
    ledgers = _ledgers(untouched)
    assert [len(ledger) for ledger in ledgers] == [TRAIN_ITERS] * RANKS
    found = find_checkpoint(untouched)
    assert found is not None
    assert found.manifest.facts["data_sets"] != []
    parent = found.manifest.facts["parent"]
    assert parent["stage"] == "stage1"
    assert parent["data_sets"] != []
    assert parent["parent"] is None, "the workspace's first stage began with nothing"
    assert all(len(packs) == 2 for ledger in ledgers for packs in ledger.values())
    assert (untouched / "config.yaml").is_file()
    assert (untouched / "tokenizer" / "preprocessor_config.json").is_file()


def test_killed_in_the_middle(workspace: Workspace, untouched: Path, tmp_path: Path) -> None:
    flags, folder = _stage_two(workspace, "killed", 3), workspace.folder / "killed"
    log = tmp_path / "log"
    launcher = start_pretraining(flags, ranks=RANKS, log=log)
    _wait_for(lambda: _steps_done(folder) >= 5 or launcher.poll() is not None)
    ranks = _rank_processes(launcher.pid)
    assert len(ranks) == RANKS, log.read_text()
    for process in [psutil.Process(launcher.pid), *ranks.values()]:
        os.kill(process.pid, signal.SIGKILL)
    launcher.wait()
    assert not (folder / "exit_reason.json").exists(), "the run was over before it was killed"
    done = pretrain(flags, ranks=RANKS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from" in done.stdout
    _assert_equal_runs(folder, untouched)


def test_sigterm_to_one_rank(workspace: Workspace, untouched: Path, tmp_path: Path) -> None:
    flags, folder = _stage_two(workspace, "stopped", 100), workspace.folder / "stopped"
    log = tmp_path / "log"
    launcher = start_pretraining(flags, ranks=RANKS, log=log)
    _wait_for(lambda: _steps_done(folder) >= 2 or launcher.poll() is not None)
    ranks = _rank_processes(launcher.pid)
    assert len(ranks) == RANKS, log.read_text()
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert launcher.wait(TIMEOUT) == 0, log.read_text()
    note = json.loads((folder / "exit_reason.json").read_text())
    assert note["reason"] == "signal"
    assert note["detail"] == "SIGTERM"
    assert 2 <= note["step"] < TRAIN_ITERS
    found = find_checkpoint(folder)
    assert found is not None
    assert found.step == note["step"]
    done = pretrain(flags, ranks=RANKS)
    assert done.returncode == 0, done.stdout + done.stderr
    _assert_equal_runs(folder, untouched)
