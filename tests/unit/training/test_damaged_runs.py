"""Resuming where people or disks have been at the run folder: the right step, or one error."""

import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dattn.runtime.cpu import enable_cpu_runtime

enable_cpu_runtime()  # before anything imports megatron-core

from megatron_dattn.checkpoint import find_checkpoint  # noqa: E402
from megatron_dattn.errors import CheckpointError  # noqa: E402
from megatron_dattn.runtime.distributed import destroy_distributed  # noqa: E402
from tests.support.checkpoint_run import Run, Setup  # noqa: E402
from tests.support.forged_checkpoints import RunsCode, forge_file, forge_manifest  # noqa: E402
from tests.support.megatron import init_model_parallel  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_process() -> Iterator[None]:
    init_model_parallel()
    yield
    destroy_distributed()


@pytest.fixture(scope="module")
def saved_run(one_process: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps, each saved."""
    folder = tmp_path_factory.mktemp("run")
    run = Run(Setup())
    checkpointer = run.checkpointer(folder, keep_last=3)
    for _ in range(3):
        run.train(1)
        checkpointer.save(run.state)
    return folder


@pytest.fixture
def folder(saved_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def resumed(one_process: None) -> Run:
    return Run(Setup(), seed=99)


def step(folder: Path, number: int) -> Path:
    return folder / f"step-{number:07d}"


def test_a_run_whose_newest_was_renamed_goes_on_and_loses_nothing(folder: Path) -> None:
    step(folder, 3).rename(step(folder, 99))
    run = Run(Setup(), seed=99)
    checkpointer = run.checkpointer(folder, keep_last=2)
    assert checkpointer.resume(run.state)
    assert run.state.progress.step == 2
    for expected in (3, 4):
        run.train(1)
        checkpointer.save(run.state)
        assert find_checkpoint(folder).step == expected
    assert step(folder, 99).is_dir()
    assert step(folder, 3).is_dir()
    assert not step(folder, 1).exists()


def test_a_finished_run_is_finished_only_if_its_last_folder_says_so(folder: Path) -> None:
    """Step 1 under the number of the last step is not the last step."""
    shutil.rmtree(step(folder, 3))
    shutil.copytree(step(folder, 1), step(folder, 3))
    run = Run(Setup(), seed=99)
    checkpointer = run.checkpointer(folder, keep_last=2)
    checkpointer.resume(run.state)
    assert run.state.progress.step == 2
    run.train(1)
    checkpointer.save(run.state)  # step 3 is there and is no obstacle
    assert find_checkpoint(folder).step == 3


def test_a_stage_starts_only_from_the_step_that_is_named(folder: Path, resumed: Run) -> None:
    step(folder, 1).rename(step(folder, 7))
    with pytest.raises(CheckpointError, match=r"named after step 7, but holds .* step 1"):
        resumed.checkpointer(None).load_weights(resumed.state, step(folder, 7))


def forge_all(folder: Path, name: str, data: bytes) -> None:
    for number in (1, 2, 3):
        forge_file(step(folder, number), name, data)


def test_random_states_of_somebody_else(folder: Path, resumed: Run) -> None:
    marker = folder / "marker"
    forge_all(folder, "rng-00000.pt", pickle.dumps(RunsCode(marker)))
    with pytest.raises(CheckpointError, match=r"rng-00000\.pt is none of ours"):
        resumed.checkpointer(folder).resume(resumed.state)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["rng-00000.pt", "loader-dp-00000.bin"])
def test_a_local_file_that_no_sum_covers(folder: Path, resumed: Run, name: str) -> None:
    for number in (1, 2, 3):
        forge_manifest(step(folder, number), lambda body: body["files"].pop(name))
    with pytest.raises(CheckpointError, match=f"does not list {name}"):
        resumed.checkpointer(folder).resume(resumed.state)


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda common: common.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("scheduler"), "does not hold the state of scheduler"),
        (drop("optimizer"), "does not hold the state of optimizer|optimizer's state"),
        (lambda common: common.update(scheduler=[1]), "does not hold this schedule's state"),
        (lambda common: common.update(scheduler={}), "does not hold this schedule's state"),
    ],
)
def test_common_state_of_another_kind(
    folder: Path, resumed: Run, change: Callable, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    common = torch.load(step(folder, 3) / "common.pt", weights_only=True)
    change(common)
    torch.save(common, folder / "forged.pt")
    forge_all(folder, "common.pt", (folder / "forged.pt").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        resumed.checkpointer(folder).resume(resumed.state)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("progress", [{}, {"step": 2}])
def test_progress_is_that_of_the_checkpoint(folder: Path, resumed: Run, progress: dict) -> None:
    forge_manifest(step(folder, 3), lambda body: body["facts"].update(progress=progress))
    with pytest.raises(CheckpointError, match="is of step 3, but its progress of step"):
        resumed.checkpointer(folder).resume(resumed.state)
