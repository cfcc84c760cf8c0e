"""A run folder belongs to one run; a dead one's is taken over."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_dattn.errors import UserError
from megatron_dattn.training import run_lock
from megatron_dattn.training.run_lock import LOCK_FILE, Owner, RunLock, is_in_use


@pytest.fixture(autouse=True)
def fast_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)


def lock_of(folder: Path, owner: Owner) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / LOCK_FILE
    path.write_text(json.dumps(dataclasses.asdict(owner)))
    return path


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_one_run_at_a_time(tmp_path: Path) -> None:
    lock = RunLock.acquire(tmp_path / "run")
    with pytest.raises(UserError, match=f"in use by run .*process {os.getpid()} on"):
        RunLock.acquire(tmp_path / "run")
    lock.release()
    assert list((tmp_path / "run").iterdir()) == []
    RunLock.acquire(tmp_path / "run").release()


def test_the_lock_of_a_dead_process_is_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock_of(tmp_path, dataclasses.replace(Owner.of_this_process(), process=ended_process()))
    lock = RunLock.acquire(tmp_path)
    assert "is taken over: its owner is dead" in caplog.text
    lock.release()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    lock = RunLock.acquire(tmp_path)
    with pytest.raises(UserError, match="in use by"):
        RunLock.acquire(tmp_path)
    lock.release()


def test_a_process_number_that_is_used_again_is_another_owner(tmp_path: Path) -> None:
    owner = Owner.of_this_process()
    lock_of(tmp_path, dataclasses.replace(owner, started=owner.started - 3600))
    RunLock.acquire(tmp_path).release()


@pytest.mark.parametrize("alive", [True, False])
def test_an_owner_on_another_machine_lives_while_it_touches_its_lock(
    tmp_path: Path, alive: bool
) -> None:
    elsewhere = dataclasses.replace(Owner.of_this_process(), host="node7", machine="node7's")
    path = lock_of(tmp_path, elsewhere)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.01):
            os.utime(path)

    thread = threading.Thread(target=beat)
    if alive:
        thread.start()
    try:
        if alive:
            with pytest.raises(UserError, match="on node7"):
                RunLock.acquire(tmp_path)
        else:
            RunLock.acquire(tmp_path).release()
    finally:
        ended.set()
        if alive:
            thread.join()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}', "\0" * 100, "[" * 5000])
def test_a_lock_that_says_nothing_is_taken_over(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    RunLock.acquire(tmp_path).release()


def test_the_lock_is_touched_and_a_lost_one_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = RunLock.acquire(tmp_path)
    path = tmp_path / LOCK_FILE
    first = path.stat().st_mtime_ns
    assert_soon(lambda: path.stat().st_mtime_ns != first)
    other = dataclasses.replace(Owner.of_this_process(), run_id="other")
    os.replace(run_lock._write_beside(path, other), path)
    assert_soon(lambda: "no longer this run's" in caplog.text)
    lock.release()
    assert json.loads(path.read_text())["run_id"] == "other"


def test_whether_a_folder_is_in_use_is_told_at_once(tmp_path: Path) -> None:
    assert not is_in_use(tmp_path)
    assert not is_in_use(tmp_path / "missing")
    lock = RunLock.acquire(tmp_path)
    assert is_in_use(tmp_path)
    lock.release()
    owner = Owner.of_this_process()
    lock_of(tmp_path, dataclasses.replace(owner, process=ended_process()))
    assert not is_in_use(tmp_path)
    path = lock_of(tmp_path, dataclasses.replace(owner, host="node7", machine="node7's"))
    hour_ago = time.time() - 3600
    os.utime(path, (hour_ago, hour_ago))
    assert not is_in_use(tmp_path)
    os.utime(path, (hour_ago + 7200, hour_ago + 7200))  # beats that come while we look
    assert is_in_use(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [LOCK_FILE]


def assert_soon(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_deleted_lock_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock = RunLock.acquire(tmp_path / "run")
    (tmp_path / "run" / LOCK_FILE).unlink()
    wait_for((tmp_path / "run" / LOCK_FILE).exists)
    with pytest.raises(UserError, match="is in use by run"):
        RunLock.acquire(tmp_path / "run")
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'run' / LOCK_FILE} was deleted under this run: it is made again"
    ]
    lock.release()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_deleted_folder_is_not_made_by_its_lock(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The next save makes it, then the lock comes back."""
    folder = tmp_path / "run"
    lock = RunLock.acquire(folder)
    (folder / LOCK_FILE).unlink()
    folder.rmdir()
    time.sleep(0.3)
    assert not folder.exists()
    assert not caplog.records
    folder.mkdir()
    wait_for((folder / LOCK_FILE).exists)
    lock.release()


def test_a_folder_in_the_lock_s_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock = RunLock.acquire(tmp_path)
    (tmp_path / LOCK_FILE).unlink()
    (tmp_path / LOCK_FILE).mkdir()
    wait_for(lambda: caplog.records)
    assert "was replaced under this run: it keeps no other run out" in caplog.text
    lock.release()
    assert not is_in_use(tmp_path)
    with pytest.raises(UserError, match="is a folder, where a run keeps its lock: move it away"):
        RunLock.acquire(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_places_that_can_hold_no_lock_are_not_in_use(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert not is_in_use(tmp_path / "loop")
    assert not is_in_use(tmp_path / ("x" * 300))
