"""Whole runs whose data worker dies or freezes: one error, in time, and word of it."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional.workspace import Workspace, make_workspace, start_pretraining

LIMIT = 120.0


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def worker_of(pid: int) -> int:
    """The one child process."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("timeout", "fault", "stop", "text"),
    [
        (2.0, signal.SIGSTOP, False, "did not send a pack within 2 s"),
        (0.0, signal.SIGSTOP, True, "within 15 s after SIGTERM asked the run to stop"),
        (0.0, signal.SIGKILL, False, "was killed by SIGKILL"),
    ],
)
def test_a_lost_worker_ends_the_run_with_one_error(
    workspace: Workspace, timeout: float, fault: signal.Signals, stop: bool, text: str
) -> None:
    name = f"run-{fault.name}-{stop}"
    folder, log = workspace.folder / name, workspace.folder / f"{name}.log"
    flags = workspace.flags(name, train_iters=100_000, num_workers=1, save_interval=50_000)
    flags += ["--data.worker_timeout_seconds", str(timeout)]
    run = start_pretraining(flags, ranks=0, log=log)
    try:
        wait_for(lambda: "iteration" in log.read_text() and "loss" in log.read_text())
        worker = worker_of(run.pid)
        os.kill(worker, fault)
        if stop:
            time.sleep(1.0)  # until what is ready is used up
            os.kill(run.pid, signal.SIGTERM)
        assert run.wait(LIMIT) == 1
    finally:
        run.kill()
        run.wait()
    output = log.read_text()
    (line,) = [line for line in output.splitlines() if "error: " in line]
    assert f"data worker {worker} " in line
    assert text in line
    assert "Traceback" not in output
    note = json.loads((folder / "exit_reason.json").read_text())
    assert note["reason"] == "crash"
    assert text in note["detail"]
    assert not Path(f"/proc/{worker}").exists()
