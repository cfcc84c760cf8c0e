"""Energon's loaders with workers that behave when things go wrong.

A worker outlives the signals that end a run: the scheduler sends SIGTERM to the whole process
group, but only the trainer may decide what happens, since saving the loader's state needs the
workers. A worker that is gone is an error, where Energon would wait for its answer for ever.
"""

import atexit
import queue
import signal
import weakref
from typing import Any

import torch

from megatron_dattn.data.energon import BasicDataLoader, SavableDataLoader, SavableDataset

PREFETCHED_PACKS = 2  # per worker
STATE_INTERVAL = 10.0  # seconds between the states a worker keeps; a resume re-reads at most this


def savable_loader(dataset: SavableDataset) -> "ResumableLoader":
    """A loader whose state can be saved, for training."""
    loader = ResumableLoader(
        dataset, checkpoint_every_sec=STATE_INTERVAL, **_options(dataset.worker_config.num_workers)
    )
    return _prepared(loader)


def basic_loader(dataset: SavableDataset) -> BasicDataLoader:
    """A loader for one pass over the data."""
    return _prepared(OnePassLoader(dataset, **_options(dataset.worker_config.num_workers)))


def _options(num_workers: int) -> dict[str, Any]:
    if num_workers:
        return {"prefetch_factor": PREFETCHED_PACKS}
    # In the trainer's process the garbage collector and its time are the trainer's.
    return {"gc_collect_every_n_steps": 0, "watchdog_timeout_seconds": None}


def _prepared(loader: Any) -> Any:
    loader.pin_memory = torch.cuda.is_available()
    if loader.num_workers:
        loader.worker_init_fn = _WorkerStart(loader.worker_init_fn)
    return loader


class _WorkerStart:
    """Energon's own start of a worker, then deafness to the signals meant for the trainer."""

    def __init__(self, start: Any) -> None:
        self.start = start

    def __call__(self, worker_id: int) -> None:
        self.start(worker_id)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class _EndsItsWorkers:
    """Mixin: ends the workers when the process ends.

    torch ends persistent workers at exit with SIGTERM (unless memory is pinned), which ours do not
    hear, and would then wait for them for ever.
    """

    num_workers: int

    def _get_iterator(self) -> Any:
        iterator = super()._get_iterator()  # type: ignore[misc]
        if self.num_workers:
            atexit.register(_end_workers, weakref.ref(iterator))
        return iterator


def _end_workers(reference: weakref.ref) -> None:
    iterator = reference()
    if iterator is None:
        return
    iterator._shutdown_workers()  # asks them, and waits for some seconds
    for worker in iterator._workers:
        if worker.is_alive():
            worker.kill()


class OnePassLoader(_EndsItsWorkers, BasicDataLoader):
    """BasicDataLoader whose workers end with the process."""


class ResumableLoader(_EndsItsWorkers, SavableDataLoader):
    """SavableDataLoader that notices dead workers when it asks for their state."""

    def _worker_command(self, *command: Any) -> list[Any]:
        for commands in self.cmd_queues:
            commands.put(command)
        answers: dict[int, Any] = {}
        for results in self.result_queues:
            answers.update(self._answer(results))
        ordered = [answers[worker] for worker in range(len(answers))]
        for answer in ordered:
            if isinstance(answer, Exception):
                raise answer
        return ordered

    def _answer(self, results: Any) -> dict[int, Any]:
        while True:
            try:
                return results.get(timeout=1.0)
            except queue.Empty:
                self._require_living_workers()

    def _require_living_workers(self) -> None:
        for worker in self._iterator._workers:
            if not worker.is_alive():
                raise RuntimeError(
                    f"data worker {worker.pid} died with exit code {worker.exitcode}; the data "
                    "loader's state cannot be saved"
                )
