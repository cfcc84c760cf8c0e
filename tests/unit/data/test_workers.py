"""Loader processes on a bad day: dead, frozen, without /dev/shm, or left behind."""

import errno
import gc
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dattn.data import worker_iterator
from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.data.loader import VLMLoader
from megatron_dattn.data.worker_iterator import describe_end
from megatron_dattn.errors import CheckpointError, ConfigError, DataError
from megatron_dattn.runtime.signals import SignalWatcher, noted_stop_signal
from tests.support.time_limit import time_limit
from tests.unit.data.builders import data_config, make_dataset, make_loader, make_records

ROOT = Path(__file__).resolve().parents[3]
LONG_ENOUGH = 60.0  # seconds, for what takes one or two


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetConfig:
    folder = tmp_path_factory.mktemp("dataset")
    return make_dataset(folder, make_records(folder, 30))


@pytest.fixture(autouse=True)
def limited(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(worker_iterator, "POLL_SECONDS", 0.05)
    with time_limit(LONG_ENOUGH):
        yield


def started(
    processor: Path, dataset: DatasetConfig, timeout: float | None = 5.0
) -> tuple[VLMLoader, list[Any]]:
    """A loader that has given a pack, and its two workers."""
    config = data_config(processor, num_workers=2, worker_timeout_seconds=timeout)
    loader = make_loader(config, [dataset])
    next(iter(loader))
    assert loader._loader is not None
    return loader, loader._loader._iterator._workers


def freeze(worker: Any) -> None:
    os.kill(worker.pid, signal.SIGSTOP)
    while worker_iterator.describe_state(worker.pid) != "stopped by a signal":
        time.sleep(0.01)


def drain(loader: VLMLoader) -> None:
    """Take packs until the ready ones are used up."""
    for _ in itertools.islice(iter(loader), 100):
        pass


def test_workers_are_ended_where_no_thread_can_be_started_any_more(
    processor: Path, dataset: DatasetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at the end of a Python 3.12, which would then wait for its workers for ever."""
    loader, workers = started(processor, dataset)
    assert loader._loader is not None
    results = loader._loader._iterator._worker_result_queue

    def refuse() -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(results, "_start_thread", refuse)
    loader._loader._iterator._shutdown_workers()
    assert not any(worker.is_alive() for worker in workers)


def test_a_dead_worker_is_one_error_for_who_waits_for_a_pack(
    processor: Path, dataset: DatasetConfig
) -> None:
    loader, workers = started(processor, dataset)
    workers[1].kill()
    workers[1].join()
    with pytest.raises(DataError, match=r"^data worker \d+ was killed by SIGKILL .*memory") as seen:
        drain(loader)
    assert str(workers[1].pid) in str(seen.value)
    assert "before it sent a pack" in str(seen.value)


def test_all_packs_of_a_step_are_made_ahead(processor: Path, dataset: DatasetConfig) -> None:
    config = data_config(processor, num_workers=1)
    loader = make_loader(config, [dataset], packs_per_step=5)
    next(iter(loader))
    assert loader._loader is not None
    ready = loader._loader._iterator._data_queue
    while ready.qsize() < 6:
        time.sleep(0.01)
    assert len(list(itertools.islice(iter(loader), 5))) == 5


def test_a_state_is_saved_without_the_workers(processor: Path, dataset: DatasetConfig) -> None:
    """It is what the trainer has: a dead worker and a frozen one keep nobody from saving."""
    loader, workers = started(processor, dataset)
    expected = [batch.sample_keys for batch in itertools.islice(iter(loader), 2)]
    state = loader.save_state()
    expected += [batch.sample_keys for batch in itertools.islice(iter(loader), 2)]
    workers[0].kill()
    freeze(workers[1])
    resumed = make_loader(data_config(processor), [dataset], data_parallel_size=1)
    with pytest.raises(CheckpointError, match=r"data\.num_workers"):
        resumed.restore_state(loader.save_state())
    resumed = make_loader(data_config(processor, num_workers=2), [dataset])
    resumed.restore_state(state)
    assert [batch.sample_keys for batch in itertools.islice(iter(resumed), 2)] == expected[2:]


def test_a_death_strikes_nobody_who_does_not_wait(processor: Path, dataset: DatasetConfig) -> None:
    """torch's handler of SIGCHLD would raise here, in the midst of a step or a checkpoint."""
    _, workers = started(processor, dataset)
    os.kill(workers[0].pid, signal.SIGKILL)
    while "zombie" not in _status(workers[0].pid):
        time.sleep(0.01)
    time.sleep(0.01)


@pytest.mark.parametrize(
    ("exitcode", "text"),
    [
        (1, "ended by itself with exit code 1"),
        (-9, "SIGKILL (most likely by the kernel, as memory ran out"),
        (-7, "SIGBUS (a file in its memory"),
        (-1, "was killed by SIGHUP"),
        (-11, "SIGSEGV (a bug in a library"),
        (-40, "signal 40"),
    ],
)
def test_exit_codes_are_put_into_words(exitcode: int, text: str) -> None:
    assert text in describe_end(exitcode)


def test_a_frozen_worker_ends_the_wait_for_a_pack(processor: Path, dataset: DatasetConfig) -> None:
    loader, workers = started(processor, dataset)
    freeze(workers[1])
    with pytest.raises(DataError, match=r"did not send a pack within 5 s \(data\.worker_t") as seen:
        drain(loader)
    assert f"data worker {workers[1].pid} did" in str(seen.value)
    assert f"{workers[1].pid} is stopped by a signal" in str(seen.value)


def test_a_stop_signal_ends_a_wait_that_has_no_limit(
    processor: Path, dataset: DatasetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_iterator, "STOP_SECONDS", 0.3)
    loader, workers = started(processor, dataset, timeout=0)
    freeze(workers[1])
    with SignalWatcher():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(DataError, match=r"within 0\.3 s after SIGTERM asked the run to stop"):
            drain(loader)


def test_a_stop_signal_does_not_end_a_wait_that_succeeds(
    processor: Path, dataset: DatasetConfig
) -> None:
    loader, _ = started(processor, dataset)
    with SignalWatcher():
        os.kill(os.getpid(), signal.SIGTERM)
        assert noted_stop_signal() == signal.SIGTERM
        assert len(list(itertools.islice(iter(loader), 12))) == 12
        loader.save_state()
    assert noted_stop_signal() is None


def test_frozen_workers_are_ended(processor: Path, dataset: DatasetConfig) -> None:
    """Though not one of them hears that it should end."""
    loader, workers = started(processor, dataset)
    for worker in workers:
        freeze(worker)
    del loader
    gc.collect()
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL] * 2


def test_a_negative_timeout_is_refused(processor: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.worker_timeout_seconds must not be negative"):
        data_config(processor, worker_timeout_seconds=-1.0)
    data_config(processor, worker_timeout_seconds=None)


def full_queue(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_volume(path: str) -> Any:
    assert path == "/dev/shm"
    return SimpleNamespace(f_bavail=8, f_frsize=4096)


@pytest.mark.parametrize(
    ("name", "fault", "text"),
    [
        ("multiprocessing.context.BaseContext.Queue", full_queue, "No space left"),
        ("os.statvfs", full_volume, "32768 of 57344 bytes are free: '/dev/shm'"),
    ],
)
def test_a_full_dev_shm_is_one_error_before_training(
    processor: Path,
    dataset: DatasetConfig,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    fault: Any,
    text: str,
) -> None:
    """Semaphores are all that still lies there."""
    monkeypatch.setattr(name, fault)
    with pytest.raises(DataError, match=rf"{text}.*--shm-size.*--ipc=host.*num_workers: 0"):
        next(iter(make_loader(data_config(processor, num_workers=2), [dataset])))
    make_loader(data_config(processor, num_workers=0), [dataset])


_PROGRAM = """
import itertools, os, sys
from pathlib import Path
from megatron_dattn.data.config import DatasetConfig
from tests.unit.data.builders import data_config, make_loader

config = data_config(Path(sys.argv[1]), num_workers=2, text_budget=65536)  # 1 MB of text tokens
loader = make_loader(config, [DatasetConfig(sys.argv[2])])
shapes = [batch.pixel_values.shape for batch in itertools.islice(iter(loader), 8)]
loader.save_state()
print("packs", len(shapes), *(worker.pid for worker in loader._loader._iterator._workers))
sys.stdout.flush()
os.kill(os.getpid(), 9)
"""
_LITTLE_MEMORY = 'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"'


def test_workers_need_no_room_in_dev_shm_and_end_with_a_trainer_that_is_killed(
    processor: Path, dataset: DatasetConfig
) -> None:
    """Of 256 kB there semaphores take 56. No worker waits for somebody who reads its packs."""
    prefix = ["unshare", "-rm", "sh", "-c", _LITTLE_MEMORY, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        prefix = []  # no mounts of one's own here
    program = [sys.executable, "-c", _PROGRAM, str(processor), dataset.path]
    finished = subprocess.run(
        [*prefix, *program], capture_output=True, text=True, timeout=LONG_ENOUGH, cwd=ROOT
    )
    packs, number, *workers = finished.stdout.split()[-4:]
    assert (packs, number) == ("packs", "8"), finished.stderr
    assert finished.returncode == -signal.SIGKILL
    for worker in map(int, workers):
        while "zombie" not in _status(worker):
            time.sleep(0.05)


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "zombie"
