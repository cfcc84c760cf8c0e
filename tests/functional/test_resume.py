"""Runs that are stopped or killed and started again equal the one that nobody touched, bitwise.

On four ranks, with all that shares or reorders work: two tensor-parallel ranks with sequence
parallelism, two data-parallel ones with the distributed optimizer and overlapped gradients, BF16,
and two processes per loader.
"""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_dattn.checkpoint import find_checkpoint
from megatron_dattn.checkpoint.load import read_common
from megatron_dattn.config.cli import parse_command_line
from megatron_dattn.training.sample_ledger import read_ledger
from megatron_dattn.training.stream import loader_of_rank
from tests.functional.workspace import Workspace, make_workspace, run_main
from tests.support.distributed import run_distributed
from tests.support.torchrun import ranks_of, torchrun
from tests.unit.training.test_event_file import points

TRAIN_ITERS = 12
RANKS = 4
REPLICAS = 2
TIMEOUT = 240.0


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """With a short stage 1, from whose weights every run of these tests starts stage 2."""
    workspace = make_workspace(tmp_path_factory.mktemp("workspace"), train_iters=TRAIN_ITERS)
    assert run_distributed(run_main, 1, workspace.flags("stage1", train_iters=1)) == [(0, "")]
    return workspace


def _stage_two(workspace: Workspace, run: str, save_interval: int) -> list[str]:
    load, folder = workspace.folder / "stage1", workspace.folder / run
    return workspace.flags(
        run,
        stage="stage2",
        load=load,
        save_interval=save_interval,
        tensorboard_dir=folder / "tensorboard",
        tensor_model_parallel_size=RANKS // REPLICAS,
        sequence_parallel="true",
        use_distributed_optimizer="true",
        overlap_grad_reduce="true",
        precision="bf16",
        num_workers=2,
    )


def _run_to_the_end(flags: list[str], log: Path) -> None:
    with torchrun(flags, ranks=RANKS, log=log) as launcher:
        launcher.join(TIMEOUT)
        assert launcher.exitcode == 0, log.read_text()


@pytest.fixture(scope="module")
def untouched(workspace: Workspace) -> Path:
    """The run folder of an uninterrupted run."""
    _run_to_the_end(_stage_two(workspace, "untouched", 3), workspace.folder / "untouched.log")
    return workspace.folder / "untouched"


def _final_state(folder: Path) -> dict[str, Any]:
    """Everything that the checkpoint of the last step holds, but for the loaders' places.

    Weights and moments as hashes of their files; what is pickled by value, as equal values need not
    give equal bytes there.
    """
    found = find_checkpoint(folder)
    assert found is not None
    assert found.step == TRAIN_ITERS
    state: dict[str, Any] = {"common": read_common(found.path)}
    for name, record in found.manifest.files.items():
        if name.endswith(".distcp"):
            state[name] = record.sha256
        elif name.startswith("rng-"):
            state[name] = torch.load(found.path / name, weights_only=True)
    own = {name for rank in range(RANKS) for name in (f"rng-{rank:05d}.pt", f"__{rank}_0.distcp")}
    assert state.keys() == {"common", *own}
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


def _next_packs(workspace: Workspace, folder: Path) -> list[Any]:
    """What the loaders give next when they are put where the last checkpoint left them.

    Not the bytes of their states, which need not be equal for equal places.
    """
    found = find_checkpoint(folder)
    assert found is not None
    config = parse_command_line(_stage_two(workspace, folder.name, 3)).config
    packs = []
    for replica in range(REPLICAS):
        loader = loader_of_rank(config, config.data.train, replica, REPLICAS, training=True)
        loader.restore_state((found.path / f"loader-dp-{replica:05d}.bin").read_bytes())
        packs.append([loader.counters(), *(vars(pack) for pack in itertools.islice(loader, 4))])
    return packs


def _assert_equal_runs(workspace: Workspace, folder: Path, untouched: Path) -> None:
    losses = points(folder / "tensorboard")["lm loss"]
    assert [step for step, _ in losses] == [*range(1, TRAIN_ITERS + 1)]
    assert losses == points(untouched / "tensorboard")["lm loss"]
    assert _ledgers(folder) == _ledgers(untouched)
    _assert_same(_final_state(folder), _final_state(untouched))
    _assert_same(_next_packs(workspace, folder), _next_packs(workspace, untouched))


def test_an_untouched_run(untouched: Path) -> None:
    note = json.loads((untouched / "exit_reason.json").read_text())
    assert note == {"reason": "finished", "step": TRAIN_ITERS, "detail": "", "exit_code": 0}
    ledgers = _ledgers(untouched)
    assert [len(ledger) for ledger in ledgers] == [TRAIN_ITERS] * REPLICAS
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
    with torchrun(flags, ranks=RANKS, log=log) as launcher:
        _wait_for(lambda: _steps_done(folder) >= 5 or launcher.exitcode is not None)
        ranks = ranks_of(launcher)
        assert len(ranks) == RANKS, log.read_text()
        launcher.kill()
        for process in ranks:
            process.kill()
        psutil.wait_procs(ranks, TIMEOUT)  # a rank that still runs owns its folder
    assert not (folder / "exit_reason.json").exists(), "the run was over before it was killed"
    _run_to_the_end(flags, log)
    assert "resumed from" in log.read_text()
    _assert_equal_runs(workspace, folder, untouched)


def test_sigterm_to_one_rank(workspace: Workspace, untouched: Path, tmp_path: Path) -> None:
    flags, folder = _stage_two(workspace, "stopped", 100), workspace.folder / "stopped"
    log = tmp_path / "log"
    with torchrun(flags, ranks=RANKS, log=log) as launcher:
        _wait_for(lambda: _steps_done(folder) >= 2 or launcher.exitcode is not None)
        ranks = ranks_of(launcher)
        assert len(ranks) == RANKS, log.read_text()
        ranks[1].terminate()
        launcher.join(TIMEOUT)
        assert launcher.exitcode == 0, log.read_text()
    note = json.loads((folder / "exit_reason.json").read_text())
    assert note["reason"] == "signal"
    assert note["detail"] == "SIGTERM"
    assert 2 <= note["step"] < TRAIN_ITERS
    found = find_checkpoint(folder)
    assert found is not None
    assert found.step == note["step"]
    _run_to_the_end(flags, log)
    _assert_equal_runs(workspace, folder, untouched)
