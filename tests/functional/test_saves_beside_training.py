"""Whole runs whose checkpoints take longer than their steps: slow, failing, stopped, killed."""

import contextlib
import errno
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_dattn.checkpoint import find_checkpoint, steps_of, writer
from megatron_dattn.checkpoint.background import Background
from megatron_dattn.runtime import signals
from megatron_dattn.runtime.signals import SignalWatcher
from megatron_dattn.training.sample_ledger import read_ledger
from tests.functional.workspace import Workspace, make_workspace, run_main
from tests.support.distributed import RankError, run_distributed

Interfere = Callable[[Path, str], None]

training_waits = threading.Event()
"""Set while this rank waits for a save to end."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def run_with_a_writer_that(interfere: Interfere, argv: list[str]) -> tuple[int, str, str]:
    """A run in which something happens in the writing thread first; exit code, errors and log.

    Args:
        interfere: is given the temporary folder of the checkpoint and the run folder.
    """
    write, finish = writer.write_share, Background.finish

    def write_share(share: Any, folder: Path, *rest: Any) -> Any:
        if share.is_copied:  # not the save that training waits for
            interfere(folder, argv[argv.index("--checkpoint.save") + 1])
        return write(share, folder, *rest)

    def wait_for_it(background: Background[Any]) -> Any:
        training_waits.set()
        return finish(background)

    stdout, watcher = io.StringIO(), SignalWatcher()
    with (
        watcher,  # the entry script makes it, but hears only where it is started as a program
        mock.patch.object(signals, "SignalWatcher", return_value=watcher),
        mock.patch.object(writer, "write_share", write_share),
        mock.patch.object(Background, "finish", wait_for_it),
        contextlib.redirect_stdout(stdout),
    ):
        code, stderr = run_main(argv)
    return code, stderr, stdout.getvalue()


def steps_done(folder: str) -> int:
    path = Path(folder) / "ledger" / "samples-dp00000.jsonl"
    return max(read_ledger(path), default=0) if path.exists() else 0


def wait_for_step(number: int, folder: str) -> None:
    """Trained while the save is under way."""
    deadline = time.monotonic() + 60
    while steps_done(folder) < number:
        assert time.monotonic() < deadline, f"training does not reach step {number}"
        time.sleep(0.01)


def be_slow(temporary: Path, folder: str) -> None:
    """Two steps later, when the next save, or the end of the run, waits for this one."""
    assert training_waits.wait(60), f"nobody waits for {temporary}"
    training_waits.clear()


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_waits_only_for_the_save_before(workspace: Workspace, ranks: int) -> None:
    name = f"slow{ranks}"
    answers = run_distributed(run_with_a_writer_that, ranks, be_slow, workspace.flags(name))
    assert [(code, error) for code, error, _ in answers] == [(0, "")] * ranks
    log = answers[0][2]
    assert log.count("the save before that of step 4 is still being written") == 1
    assert log.count("is still being written") == 1
    folder = workspace.folder / name
    assert steps_of(folder) == [6, 8]
    assert find_checkpoint(folder).step == 8
    saved = [line.split()[-1].removesuffix("/") for line in log.splitlines() if " saved " in line]
    assert [path[-1] for path in saved] == ["2", "4", "6", "8"]
    lines = log.splitlines()
    (second,) = [n for n, line in enumerate(lines) if "saved" in line and "step-0000002" in line]
    (fourth,) = [n for n, line in enumerate(lines) if "iteration" in line and " 4/" in line]
    assert fourth < second, "step 4 was trained while step 2 was saved"


def meet_a_full_disk(temporary: Path, folder: str) -> None:
    if temporary.name.startswith("step-0000004"):
        wait_for_step(5, folder)
        path = str(temporary / "__0_0.distcp")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_writer_that_fails_ends_the_run(workspace: Workspace, ranks: int) -> None:
    name = f"full{ranks}"
    flags = workspace.flags(name)
    answers = run_distributed(run_with_a_writer_that, ranks, meet_a_full_disk, flags)
    folder = workspace.folder / name
    error = answers[0][1]
    assert [code for code, *_ in answers] == [answers[0][0]] * ranks
    assert answers[0][0] != 0
    assert error.count("\n") == 1
    assert f"disk full: {folder}/step-0000004 needs" in error
    assert "the previous checkpoint stays the latest" in error
    note = json.loads((folder / "exit_reason.json").read_text())
    assert note["exit_code"] == answers[0][0]
    assert note["detail"] in error
    assert steps_of(folder) == [2]
    assert find_checkpoint(folder).step == 2
    assert not [entry for entry in folder.iterdir() if ".tmp-" in entry.name]
    assert run_distributed(run_main, ranks, flags) == [(0, "")] * ranks
    assert find_checkpoint(folder).step == 8


def stop_me(temporary: Path, folder: str) -> None:
    """While training goes on; the save that was asked for before must not be lost either."""
    wait_for_step(3, folder)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)


def test_sigterm_during_a_save(workspace: Workspace) -> None:
    flags = workspace.flags("stopped", train_iters=100_000)
    ((code, error, log),) = run_distributed(run_with_a_writer_that, 1, stop_me, flags)
    assert (code, error) == (0, "")
    folder = workspace.folder / "stopped"
    note = json.loads((folder / "exit_reason.json").read_text())
    assert (note["reason"], note["detail"]) == ("signal", "SIGTERM")
    assert note["step"] >= 3
    assert find_checkpoint(folder).step == note["step"]
    assert f"saved {folder}/step-0000002" in log


def lose_this_rank(temporary: Path, folder: str) -> None:
    if temporary.name.startswith("step-0000004"):
        wait_for_step(5, folder)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_during_a_save_leaves_the_one_before(workspace: Workspace) -> None:
    flags = workspace.flags("killed")
    with pytest.raises(RankError, match="exit code -9"):
        run_distributed(run_with_a_writer_that, 1, lose_this_rank, flags)
    folder = workspace.folder / "killed"
    assert find_checkpoint(folder).step == 2
    assert len([entry for entry in folder.iterdir() if ".tmp-" in entry.name]) == 1
    assert run_distributed(run_main, 1, flags) == [(0, "")]
    assert find_checkpoint(folder).step == 8
    assert not [entry for entry in folder.iterdir() if ".tmp-" in entry.name]
    ledger = read_ledger(folder / "ledger" / "samples-dp00000.jsonl")
    assert sorted(ledger) == list(range(1, 9))
