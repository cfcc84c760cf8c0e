"""How data workers fare, in words, and how long they are waited for."""

import signal
import time
from pathlib import Path

from megatron_dattn.runtime.signals import noted_stop_signal

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
