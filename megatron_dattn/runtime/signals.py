"""Stopping on request: a signal to any rank ends the run on all of them after the same step.

A handler only takes a note. The loop asks `requested_anywhere` once per step, or folds `flag` into
a MAX reduction of its own, so that no rank leaves while another still waits for it.
"""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from megatron_dattn.runtime.distributed import get_device

# Schedulers and torchrun send SIGTERM; Slurm's --signal can warn earlier, by custom with SIGUSR1.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


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

    A second SIGINT acts as usual (KeyboardInterrupt), for whoever cannot wait for the step to end.
    Must be entered in the main thread, as Python delivers signals only there.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = STOP_SIGNALS) -> None:
        self._signals = signals
        self._former: dict[signal.Signals, object] = {}
        self._received: signal.Signals | None = None

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
            raise KeyboardInterrupt
        if self._received is None:
            self._received = signal.Signals(number)

    @property
    def received(self) -> signal.Signals | None:
        """The first stop signal that this process got."""
        return self._received

    @property
    def flag(self) -> int:
        """0, or the number of the signal: fold it into a MAX reduction, then `from_flag`."""
        return int(self._received or 0)

    @staticmethod
    def from_flag(flag: int) -> signal.Signals | None:
        """The signal behind a reduced flag."""
        return signal.Signals(flag) if flag else None

    def requested_anywhere(self, group: dist.ProcessGroup | None = None) -> signal.Signals | None:
        """A stop signal that some rank of the group got, the same answer on every rank.

        Collective over the group (the world by default): one all-reduce of one integer.
        """
        if not dist.is_initialized():
            return self._received
        flag = torch.tensor([self.flag], dtype=torch.int32, device=get_device())
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
        return self.from_flag(int(flag.item()))
