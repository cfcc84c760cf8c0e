"""Stopping on request: a signal to any rank ends the run on all of them after the same step.

A handler only takes a note. The loop asks `requested_anywhere` once per step, or folds `flag` into
a MAX reduction of its own, so that no rank leaves while another still waits for it. A launcher that
is gone counts as such a request too: killed alone, it would leave the ranks to train for nobody.

This module is the first that the entry script imports, so it imports nothing that takes time.
"""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

# Schedulers and torchrun send SIGTERM; Slurm's --signal can warn earlier, by custom with SIGUSR1.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAUNCHER_IS_GONE = signal.SIGHUP  # by its meaning: whoever started this process has hung up
EXIT_INTERRUPTED = 130  # as shells report SIGINT

logger = logging.getLogger(__name__)


def noted_stop_signal() -> signal.Signals | None:
    """The stop signal that a SignalWatcher of this process has noted, if one is at work.

    For waits deep below the loop, which would otherwise go on after the signal.
    """
    for number in STOP_SIGNALS:
        watcher = getattr(signal.getsignal(number), "__self__", None)
        if isinstance(watcher, SignalWatcher):
            return watcher.received
    return None


class SignalWatcher:
    """Context manager that notes stop signals of this process instead of dying from them.

    A second SIGINT is for whoever cannot wait for the step to end: it raises KeyboardInterrupt
    inside of `interruptible`, and ends the process at once elsewhere, while modules are imported
    or the process is ending. A third one always does. Must be entered in the main thread, as Python
    delivers signals only there.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = STOP_SIGNALS) -> None:
        self._signals = signals
        self._former: dict[signal.Signals, object] = {}
        self._received: signal.Signals | None = None
        self._interruptible = False
        self._process, self._parent = os.getpid(), os.getppid()
        self._watches_launcher = False

    def __enter__(self) -> "SignalWatcher":
        for number in self._signals:
            self._former[number] = signal.signal(number, self._take_note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._former.clear()

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            if self._interruptible:
                self._interruptible = False  # once more: not even what cleans up is waited for
                raise KeyboardInterrupt
            os.write(2, b"interrupted\n")
            os._exit(EXIT_INTERRUPTED)
        if self._received is None:
            self._received = signal.Signals(number)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block in which a second SIGINT is a KeyboardInterrupt, and who catches it."""
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def ignore_requests(self) -> None:
        """From now on a request to stop asks for nothing: this process is ending by itself.

        Python gives its handlers back some time before a process has ended, and a SIGTERM that is
        repeated meanwhile would kill what has done all it was asked for: torchrun would call that a
        crash. SIGINT is left as it is, for whoever cannot wait.
        """
        for number in self._signals:
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_IGN)

    def watch_launcher(self) -> None:
        """From now on, an end of the process that started this one is a request to stop.

        Not for a process that somebody has started by hand: it may outlive its shell.
        """
        self._watches_launcher = True

    @property
    def received(self) -> signal.Signals | None:
        """The first stop signal that this process got."""
        watches = self._watches_launcher and os.getpid() == self._process  # not a forked worker
        is_orphan = watches and os.getppid() != self._parent
        if self._received is None and is_orphan:
            self._received = LAUNCHER_IS_GONE
            logger.warning(
                "the launcher (process %d) is gone: this is taken for %s, a request to stop",
                self._parent,
                LAUNCHER_IS_GONE.name,
            )
        return self._received

    @property
    def flag(self) -> int:
        """0, or the number of the signal: fold it into a MAX reduction, then `from_flag`."""
        return int(self.received or 0)

    @staticmethod
    def from_flag(flag: int) -> signal.Signals | None:
        """The signal behind a reduced flag."""
        return signal.Signals(flag) if flag else None

    def requested_anywhere(self, group: "dist.ProcessGroup | None" = None) -> signal.Signals | None:
        """A stop signal that some rank of the group got, the same answer on every rank.

        Collective over the group (the world by default): one all-reduce between the hosts.
        """
        import torch
        import torch.distributed as dist

        from megatron_dattn.runtime.distributed import host_group

        if not dist.is_initialized():
            return self.received
        flag = torch.tensor([self.flag], dtype=torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=host_group(group))
        return self.from_flag(int(flag.item()))
