"""Processes that end with the one that started them, however that ends.

One that waits for work from a pipe whose other end it holds too would wait for ever; one that
writes would go on beside the next run.
"""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int) -> None:
    """Have the system kill this process when its parent ends, also of SIGKILL.

    Args:
        parent: the parent's process id; if it is no longer the parent, this process ends at once.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it has just died
