"""Where torchrun looks for the reason why a process ended.

Without this file its report says `error_file: <N/A>` and names no reason, below thirty lines of its
own traceback, which it prints whatever happened. Batch scripts read the file too: torchrun's exit
status does not tell a wrong setting from a crash.
"""

import json
import os
import time
from pathlib import Path

from megatron_dattn.runtime.launcher import Launch


def write_error_file(launch: Launch, reason: str, exit_code: int) -> None:
    """Tell torchrun why this process ends; does nothing under other launchers.

    Args:
        reason: one line, or a traceback.
        exit_code: what the process is going to end with.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    now = int(time.time())
    if launch.local_rank > 0 and exit_code != 1:
        # The ranks of a host meet the same error: said once, and first seen on the first of them.
        reason, now = "the same error as local rank 0", now + 1
    message = {
        "message": reason,
        "extraInfo": {"py_callstack": reason, "timestamp": str(now)},
        "errorCode": exit_code,
    }
    try:
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")
    except OSError:
        return  # the reason also stands on standard error
