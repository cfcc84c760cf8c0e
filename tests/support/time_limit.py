"""Ends what would wait for ever, in the process of the test."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Hang(BaseException):
    """It took longer than it may. No `except Exception` holds it up."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Hang in the block after so many seconds; for the main thread."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Hang(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
