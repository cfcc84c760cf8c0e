"""torch's iterator over loader processes, made for bad days.

Every wait has an end, and what ended it is one OutageError: a worker that died, is frozen, or hangs
in a file system. Three habits of torch's are different here:

- Its SIGCHLD handler raises wherever the trainer is just then, in the middle of a checkpoint too.
  Here a dead worker is found by whoever waits for it.
- It receives in the thread that waits, where a worker frozen while it sends is waited for without
  a limit. Here a thread receives, as torch's own does where memory is pinned.
- It ends workers by asking each and waiting for seconds. They only read, so there is nothing that
  they must finish, and those that hang do not hear: here they are killed.
"""

import os
import queue
import signal
import threading
import time
from multiprocessing import process as processes
from pathlib import Path
from typing import Any

from torch.utils.data import _utils
from torch.utils.data.dataloader import DataLoader, _MultiProcessingDataLoaderIter

from megatron_dattn.errors import OutageError
from megatron_dattn.runtime.signals import noted_stop_signal

POLL_SECONDS = 0.5
END_SECONDS = 5.0  # for killed workers to be gone: not at once if a file system holds them
STOP_SECONDS = 15.0
"""How long a worker is waited for once the run was asked to stop: launchers kill after 30 s."""

_STATES = {
    "D": "waiting for a disk or a file system",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
}
_ENDS = {
    signal.SIGKILL: "most likely by the kernel, as memory ran out; give the job more, or set fewer "
    "data.num_workers or a smaller data.packing_buffer_size",
    signal.SIGBUS: "a file in its memory lost its room; is a disk or /dev/shm full?",
    signal.SIGSEGV: "a bug in a library; data.num_workers: 0 shows where",
    signal.SIGABRT: "a library gave up; data.num_workers: 0 shows where",
}


def describe_end(exitcode: int | None) -> str:
    """Say how a process ended, from its exit code as multiprocessing has it: -9 is SIGKILL."""
    if exitcode is None or exitcode >= 0:
        return f"ended by itself with exit code {exitcode}"
    try:
        number = signal.Signals(-exitcode)
    except ValueError:
        return f"was killed by signal {-exitcode}"
    cause = f" ({_ENDS[number]})" if number in _ENDS else ""
    return f"was killed by {number.name}{cause}"


def describe_state(pid: int) -> str | None:
    """Say what keeps a living process from working, if that is to be seen from outside."""
    try:
        # After the name, which may hold anything.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return None
    return _STATES.get(state)


class Patience:
    """One wait for a worker: at most so many seconds, fewer once the run was asked to stop."""

    def __init__(self, seconds: float | None) -> None:
        """
        Args:
            seconds: None waits for ever, unless the run is asked to stop.
        """
        self._seconds = seconds
        self._started = time.monotonic()
        self._asked_to_stop: float | None = None

    def end(self) -> str | None:
        """The reason why the wait is over, as the end of "did not answer ..."; None while it is
        not."""
        now = time.monotonic()
        if self._seconds is not None and now - self._started >= self._seconds:
            return f"within {self._seconds:g} s (data.worker_timeout_seconds)"
        stop = noted_stop_signal()
        if stop is None:
            return None
        if self._asked_to_stop is None:
            self._asked_to_stop = now
        if now - self._asked_to_stop < STOP_SECONDS:
            return None
        return f"within {STOP_SECONDS:g} s after {stop.name} asked the run to stop"


class WatchedIterator(_MultiProcessingDataLoaderIter):
    """Items of the workers, in their order."""

    def __init__(self, loader: DataLoader, timeout_seconds: float | None) -> None:
        """Start the workers.

        Args:
            timeout_seconds: how long one may be waited for; None for ever.
        """
        self._process = os.getpid()
        self._timeout_seconds = timeout_seconds
        # For `_shutdown_workers`, should the start fail.
        self._shutdown = False
        self._workers: list[Any] = []
        self._index_queues: list[Any] = []
        self._receiver: threading.Thread | None = None
        super().__init__(loader)
        _utils.signal_handling._remove_worker_pids(id(self))
        self._worker_pids_set = False
        if self._pin_memory:
            self._receiver = self._pin_memory_thread
        else:
            self._data_queue: Any = queue.Queue()
            self._receiver = threading.Thread(
                target=_receive, args=(self._worker_result_queue, self._data_queue), daemon=True
            )
            self._receiver.start()

    def _get_data(self) -> Any:
        patience = Patience(self._timeout_seconds)
        while True:
            try:
                item = self._data_queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                self.require_living("sent a pack")
                self.require_patience(patience, self._task_info[self._rcvd_idx][0], "send a pack")
                continue
            if isinstance(item, Exception):
                raise OutageError(f"a pack of a data worker cannot be received: {item!r}") from item
            return item

    def require_living(self, task: str) -> None:
        """Raise OutageError if a worker is dead.

        Args:
            task: what it should have done.
        """
        for worker in self._workers:
            if not worker.is_alive():
                raise OutageError(
                    f"data worker {worker.pid} {describe_end(worker.exitcode)} before it {task}; "
                    "start again: the run goes on from its last checkpoint"
                )
        if self._receiver is None or not self._receiver.is_alive():
            raise OutageError("the thread that receives the data workers' packs has ended")

    def require_patience(self, patience: Patience, number: int, task: str) -> None:
        """Raise OutageError if one has waited long enough for a worker.

        Args:
            number: of the worker.
            task: what it should do.
        """
        end = patience.end()
        if end is None:
            return
        # Others may be to blame: they share the pipe to the trainer.
        hanging = [(worker.pid, describe_state(worker.pid)) for worker in self._workers]
        states = [f"{pid} is {state}" for pid, state in hanging if state is not None]
        raise OutageError(
            f"data worker {self._workers[number].pid} did not {task} {end}"
            f"{''.join(f'; {state}' for state in states)}. See whether the file system of the "
            "images answers, or give it longer, and start again: the run goes on from its last "
            "checkpoint"
        )

    def _shutdown_workers(self) -> None:
        """End the workers, bounded in time whatever they are at."""
        if self._shutdown or os.getpid() != self._process:
            return  # a worker has inherited the duty, but not the workers
        self._shutdown = True
        self._end_receiver()
        deadline = time.monotonic() + END_SECONDS
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            # Should it still be there, multiprocessing would wait for it at the end of the process.
            processes._children.discard(worker)  # type: ignore[attr-defined]
        for commands in self._index_queues:
            commands.cancel_join_thread()
            commands.close()

    def _end_receiver(self) -> None:
        """Not waited for if it hangs: a frozen worker may have sent half a pack."""
        if self._receiver is None:
            return
        if self._pin_memory:
            self._pin_memory_thread_done_event.set()
        self._worker_result_queue.cancel_join_thread()
        try:
            self._worker_result_queue.put((None, None))  # wakes it
        except RuntimeError:
            # The queue sends from a thread of its own, which Python 3.12 no longer starts when the
            # interpreter is at its end; then the receiver, a daemon, ends with it.
            return
        self._receiver.join(timeout=1.0)


def _receive(source: Any, target: "queue.Queue[Any]") -> None:
    try:
        while (item := source.get()) != (None, None):
            target.put(item)
    except Exception as error:
        target.put(error)
