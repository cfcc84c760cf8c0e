"""Energon's loaders with workers that behave when things go wrong.

A worker outlives the signals that end a run: the scheduler sends SIGTERM to the whole process
group, but only the trainer may decide what happens, since saving the loader's state needs the
workers. A worker that is gone is an error, where Energon would wait for its answer for ever.
"""

import atexit
import gc
import os
import queue
import signal
import weakref
from typing import Any

import torch

from megatron_dattn.data.energon import BasicDataLoader, SavableDataLoader, SavableDataset

PREFETCHED_PACKS = 2  # per worker
STATE_INTERVAL = 10.0  # seconds between the states a worker keeps; a resume re-reads at most this

# In the trainer's process the garbage collector and its time are the trainer's.
_IN_PROCESS: dict[str, Any] = {"gc_collect_every_n_steps": 0, "watchdog_timeout_seconds": None}


def savable_loader(dataset: SavableDataset) -> "ResumableLoader":
    """A loader whose state can be saved, for training."""
    if dataset.worker_config.num_workers:
        options: dict[str, Any] = {"prefetch_factor": PREFETCHED_PACKS}
    else:
        options = _IN_PROCESS
    loader = ResumableLoader(dataset, checkpoint_every_sec=STATE_INTERVAL, **options)
    loader.pin_memory = torch.cuda.is_available()
    if loader.num_workers:
        loader.worker_init_fn = _WorkerStart(loader.worker_init_fn)
    return loader


def basic_loader(dataset: SavableDataset) -> BasicDataLoader:
    """A loader for one pass over the data, in this process."""
    loader = BasicDataLoader(dataset, **_IN_PROCESS)
    loader.pin_memory = torch.cuda.is_available()
    return loader


class _WorkerStart:
    """Energon's own start of a worker, then deafness to the signals meant for the trainer.

    What the worker inherits is the trainer's, garbage too: collecting it here would run destructors
    of process groups whose threads were not inherited, which ends in a segmentation fault.
    """

    def __init__(self, start: Any) -> None:
        self.start = start

    def __call__(self, worker_id: int) -> None:
        gc.freeze()
        self.start(worker_id)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_workers(iterator: Any, process: int) -> None:
    if os.getpid() != process:  # a worker has inherited the duty, but not the workers
        return
    iterator._shutdown_workers()  # asks them, and waits for some seconds
    for worker in iterator._workers:
        if worker.is_alive():
            worker.kill()


class ResumableLoader(SavableDataLoader):
    """SavableDataLoader that notices dead workers, and whose workers end with it.

    The workers end when the loader is no longer used, at the latest when the process ends. torch
    alone would send SIGTERM at the end of the process, which they do not hear, and wait for ever;
    and when a loader is garbage, its queues may be closed before the workers are told to stop.
    """

    def _get_iterator(self) -> Any:
        if self.num_workers:
            gc.collect()  # before the workers inherit it, see _WorkerStart
        iterator = super()._get_iterator()
        if self.num_workers:
            end = weakref.finalize(self, _end_workers, iterator, os.getpid())
            # Earlier than multiprocessing's own handler, where finalizers would come too late.
            end.atexit = False
            atexit.register(end)
        return iterator

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
