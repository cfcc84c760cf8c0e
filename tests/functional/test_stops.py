"""Runs that are told to stop at the worst moment, or whose launcher is killed alone."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_dattn.checkpoint import find_checkpoint
from megatron_dattn.training.sample_ledger import read_ledger
from tests.functional.workspace import (
    Workspace,
    command,
    environment,
    make_workspace,
    start_pretraining,
)

TIMEOUT = 120.0


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("workspace"), train_iters=100_000)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def hears(process: subprocess.Popen[bytes], number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (caught,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(caught, 16) >> (number - 1) & 1)


def steps_done(folder: Path) -> int:
    path = folder / "ledger" / "samples-dp00000.jsonl"
    return max(read_ledger(path), default=0) if path.exists() else 0


# What is given to on_exit runs when Python has ended. It calls kill(exit status, signal), and a
# status of 0 means all of this process's group.
LAST_OF_ALL = """
import ctypes, runpy, signal, sys
libc = ctypes.CDLL(None)
libc.on_exit(libc.kill, signal.SIGTERM)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_sigterm_while_modules_are_imported(workspace: Workspace, tmp_path: Path) -> None:
    """Heard from the first lines on, seconds before there is anything to stop; and ignored at the
    very end, where Python has given its handlers back: schedulers repeat it."""
    log, folder = tmp_path / "log", workspace.folder / "early"
    script, *flags = command(workspace.flags("early"), ranks=0)[1:]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", LAST_OF_ALL, script, *flags],
            env=environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    wait_for(lambda: hears(process, signal.SIGTERM) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT) == 0, log.read_text()
    assert "SIGTERM: stopping before the first step; there is nothing to save" in log.read_text()
    assert "Traceback" not in log.read_text()
    note = json.loads((folder / "exit_reason.json").read_text())
    assert (note["reason"], note["step"], note["detail"]) == ("signal", None, "SIGTERM")
    assert [path.name for path in folder.iterdir()] == ["exit_reason.json"]


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(workspace: Workspace, tmp_path: Path) -> None:
    log, folder = tmp_path / "log", workspace.folder / "twice"
    flags = workspace.flags("twice", save_interval=0)
    process = start_pretraining([*flags, "--data.num_workers", "1"], ranks=0, log=log)
    wait_for(lambda: steps_done(folder) >= 2 or process.poll() is not None)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children, "it has a process that loads"
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)  # two that are pending at a time are one
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT) == 130, log.read_text()
    assert "error: interrupted by a second SIGINT" in log.read_text()
    assert "Traceback" not in log.read_text()
    note = json.loads((folder / "exit_reason.json").read_text())
    assert (note["reason"], note["exit_code"]) == ("interrupted", 130)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


@pytest.mark.slow
def test_ranks_end_with_their_launcher(workspace: Workspace, tmp_path: Path) -> None:
    """Killed alone, it can tell them nothing."""
    log, folder = tmp_path / "log", workspace.folder / "orphans"
    launcher = start_pretraining(workspace.flags("orphans", save_interval=0), ranks=2, log=log)
    wait_for(lambda: steps_done(folder) >= 2 or launcher.poll() is not None)
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    assert len(ranks) >= 2, log.read_text()
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    for process in alive:
        process.kill()
    assert not alive, log.read_text()
    note = json.loads((folder / "exit_reason.json").read_text())
    assert (note["reason"], note["detail"]) == ("signal", "SIGHUP")
    found = find_checkpoint(folder)
    assert found is not None
    assert found.step == note["step"], "nothing was lost"
    assert f"the launcher (process {launcher.pid}) is gone" in log.read_text()
