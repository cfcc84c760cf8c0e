"""Energon's loader with workers that behave when things go wrong.

A worker outlives the signals that end a run: the scheduler sends SIGTERM to the whole process
group, but only the trainer may decide what happens, and it goes on to the end of a step. It ends
with the trainer, however that ends. A worker that is gone or does not answer is an
error (worker_iterator.py), where Energon would wait for ever.

What workers send goes through pipes as plain bytes. torch would put it into /dev/shm: Docker gives
that 64 MB, and where it is full a worker dies of a bus error or its pack is lost without a word. A
pipe costs the trainer about a millisecond of CPU per MB, in the thread that receives.
"""

import atexit
import contextlib
import ctypes
import errno
import gc
import os
import signal
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch

from megatron_dattn.data.energon import BasicDataLoader, SavableDataset
from megatron_dattn.data.worker_iterator import WatchedIterator
from megatron_dattn.errors import DataError

# In the trainer's process the garbage collector and its time are the trainer's.
_IN_PROCESS: dict[str, Any] = {"gc_collect_every_n_steps": 0, "watchdog_timeout_seconds": None}
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_SEMAPHORE_FOLDER = "/dev/shm"  # of the C library
_SEMAPHORES = 8  # torch's: a queue of packs and an event
_SEMAPHORES_PER_WORKER = 3  # a queue of commands


def watched_loader(
    dataset: SavableDataset,
    worker_timeout_seconds: float | None = None,
    *,
    packs_at_a_time: int = 1,
) -> "WatchedLoader":
    """A loader of what the dataset gives, by as many processes as its settings say.

    Args:
        packs_at_a_time: how many are taken in a row: so many are made meanwhile, and one more by
            each worker, as what goes out may be a rejected sample.
        worker_timeout_seconds: how long a worker may be waited for; None for ever.

    Raises:
        DataError: this host cannot have the workers.
    """
    workers = dataset.worker_config.num_workers
    options = _IN_PROCESS
    if workers:
        options = {"prefetch_factor": 1 + -(-packs_at_a_time // workers)}
    with _one_error():
        _require_semaphores(workers)
        loader = WatchedLoader(dataset, **options)
    loader.worker_timeout_seconds = worker_timeout_seconds
    loader.pin_memory = torch.cuda.is_available()
    if loader.num_workers:
        loader.worker_init_fn = _WorkerStart(loader.worker_init_fn)
    return loader


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """What the system refuses to workers, as one error: processes, descriptors, semaphores."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"data workers cannot be started: {error}. They need processes, open files and "
            "some hundred kB of /dev/shm (docker run --shm-size=1g or --ipc=host); "
            "data.num_workers: 0 does without them"
        ) from error


def _require_semaphores(num_workers: int) -> None:
    """Raise OSError if /dev/shm has no room for the semaphores of queues, a page for each.

    They are opened one by one, most of them when the first pack is asked for: after the start.
    """
    if not num_workers:
        return
    needed = 4096 * (_SEMAPHORES + num_workers * _SEMAPHORES_PER_WORKER)
    volume = os.statvfs(_SEMAPHORE_FOLDER)
    free = volume.f_bavail * volume.f_frsize
    if free < needed:
        raise OSError(errno.ENOSPC, f"only {free} of {needed} bytes are free", _SEMAPHORE_FOLDER)


class _WorkerStart:
    """Energon's own start of a worker, then ignoring the signals meant for the trainer.

    What the worker inherits is the trainer's, garbage too: collecting it here would run destructors
    of process groups whose threads were not inherited, which ends in a segmentation fault.
    """

    def __init__(self, start: Any) -> None:
        self.start = start
        self.trainer = os.getpid()

    def __call__(self, worker_id: int) -> None:
        gc.freeze()
        self._die_with_the_trainer()
        self.start(worker_id)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ForkingPickler.register(torch.Tensor, _as_bytes)  # in this process only

    def _die_with_the_trainer(self) -> None:
        """Also of SIGKILL: a worker that is about to send would wait for a reader for ever."""
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.trainer:
            os._exit(1)  # it has just died


def _as_bytes(tensor: torch.Tensor) -> tuple[Any, tuple[np.ndarray]]:
    return torch.from_numpy, (tensor.numpy(),)


class WatchedLoader(BasicDataLoader):
    """BasicDataLoader that notices dead and silent workers, and whose workers end with it.

    The workers end when the loader is no longer used, at the latest when the process ends. torch
    alone would send SIGTERM at the end of the process, which they do not hear, and wait for ever.
    """

    worker_timeout_seconds: float | None = None

    def _get_iterator(self) -> Any:
        if not self.num_workers:
            return super()._get_iterator()
        self.check_worker_number_rationality()
        gc.collect()  # before the workers inherit it, see _WorkerStart
        with _one_error():
            iterator = WatchedIterator(self, self.worker_timeout_seconds)
        # A process that multiprocessing started (torchrun --run-path) calls its finalizers alone;
        # in any other they come after torch's own handler, which waits in vain: hence atexit.
        atexit.register(Finalize(self, iterator._shutdown_workers, exitpriority=0))
        return iterator
