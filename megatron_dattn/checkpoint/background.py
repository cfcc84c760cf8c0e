"""A save that goes on beside training: a thread writes, the ranks meet between steps.

The thread speaks to no other rank: its collectives could meet training's in another order on
another rank. Between two steps the ranks exchange whether all have ended their part (`advance`), as
megatron-core's AsyncCallsQueue does, and only then go on together. It is a thread, as a forked
process holds locks of CUDA, gloo and torch that nobody releases.
"""

import _thread
import threading
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from megatron_dattn.checkpoint.commit import LocalWork, Steps, go_on
from megatron_dattn.checkpoint.writer import SaveCancelledError
from megatron_dattn.runtime.distributed import host_group, world_size

T = TypeVar("T")

_POLL_SECONDS = 0.05
_RUNNING, _FAILED = 0, 1


class _Helper:
    """One piece of work, done by a thread, or by whoever waits for it if there is none to be had.

    `threading` waits for ever for a thread that dies before it begins, as it may where memory is
    short; see `HashBeside`.
    """

    def __init__(self, work: LocalWork) -> None:
        self.purpose = work.purpose
        self._work = work.do
        self._taken = _thread.allocate_lock()
        self._ended = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None
        try:
            _thread.start_new_thread(self._run, ())
        except (RuntimeError, MemoryError):
            return  # no thread is to be had

    def _run(self) -> None:
        if not self._taken.acquire(blocking=False):
            return
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until it has ended, for so long at most."""
        self._run()  # nothing happens if the thread has begun
        self._ended.wait(seconds)

    def leave(self, seconds: float) -> None:
        """Wait for it only if it has begun; it will not begin any more."""
        if not self._taken.acquire(blocking=False):
            self._ended.wait(seconds)

    @property
    def is_running(self) -> bool:
        return not self._ended.is_set()

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def result(self) -> Any:
        """What the work returned, or raise what it raised; None if it was cancelled."""
        if self._error is not None and not isinstance(self._error, SaveCancelledError):
            raise self._error
        return self._result


class Background(Generic[T]):
    """Steps whose local work is done beside what this thread does meanwhile.

    Making one does what comes before the first local work. Collective over the world.

    Args:
        steps: as of `save_steps`.
        cancelled: the event that ends the local work early.
    """

    def __init__(self, steps: Steps[T], cancelled: threading.Event) -> None:
        self._steps = steps
        self._cancelled = cancelled
        self._helper = _Helper(next(steps))
        self._results: list[T] = []

    def advance(self) -> bool:
        """Go on if the local work has ended on all ranks. Collective; one small exchange if not.

        Returns:
            Whether everything is done.

        Raises:
            UserError: on all ranks, if the work failed on any.
        """
        state = _max_over_ranks([self._helper.is_running, self._helper.has_failed])
        if state[_FAILED]:
            self._cancelled.set()  # what the others still write is worthless
            self._helper.wait()
        elif state[_RUNNING]:
            return False
        try:
            self._helper = _Helper(go_on(self._steps, self._helper.purpose, self._helper.result))
        except StopIteration as end:
            self._results.append(end.value)
        return bool(self._results)

    def finish(self) -> T:
        """Wait for the end, and go on until then. Collective."""
        while not self.advance():
            # Not for longer: another rank may have failed, and a collective waits only so long.
            self._helper.wait(_POLL_SECONDS)
        return self._results[0]

    def abandon(self, seconds: float) -> None:
        """Give up without the other ranks; wait so long at most until this one's thread notices.

        At the end of a process, a thread inside of C++ would end it with an abort.
        """
        self._cancelled.set()
        self._helper.leave(seconds)


def _max_over_ranks(flags: list[bool]) -> list[int]:
    values = torch.tensor([int(flag) for flag in flags], dtype=torch.int32)
    if world_size() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX, group=host_group())
    return values.tolist()
