"""Says why a rank of a run ends: one line on standard error, and a file for torchrun.

Without that file torchrun's report says `error_file: <N/A>` and names no reason, below thirty lines
of its own traceback, which it prints whatever happened. Batch scripts read the file too: torchrun's
exit status does not tell a wrong setting from a crash.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

from megatron_dattn.errors import EXIT_USER_ERROR, UserError
from megatron_dattn.runtime.launcher import Launch


def write_error_file(launch: Launch, reason: str, exit_code: int, *, shared: bool) -> None:
    """Tell torchrun why this process ends; does nothing under other launchers.

    Args:
        reason: one line, or a traceback.
        exit_code: what the process is going to end with.
        shared: all ranks have the same reason, which is then said once per host.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    now = int(time.time())
    if shared and launch.local_rank > 0:
        # torchrun takes the earliest for the root cause: the one that says it, which may write its
        # file some seconds later, as it looks into the save folder before.
        reason, now = "the same error as local rank 0", now + 60
    message = {
        "message": reason,
        "extraInfo": {"py_callstack": reason, "timestamp": str(now)},
        "errorCode": exit_code,
    }
    try:
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")
    except OSError:
        return  # the reason also stands on standard error


def report_error(launch: Launch, message: str, exit_code: int, *, shared: bool = True) -> int:
    """Say it once: all ranks meet the same error. Returns the exit code."""
    write_error_file(launch, f"error: {message}", exit_code, shared=shared)
    if launch.rank == 0:
        with contextlib.suppress(OSError):
            print(f"error: {message}", file=sys.stderr, flush=True)
    return exit_code


def refuse(launch: Launch, error: UserError) -> int:
    """End with a mistake that was met before the ranks have met."""
    if launch.world_size > 1:
        from megatron_dattn.runtime.rank_errors import share_refusal

        error = share_refusal(error)
    return report_error(launch, str(error), EXIT_USER_ERROR)
