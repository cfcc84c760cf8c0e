"""The one line with which a rank of a run ends: on standard error, and for torchrun."""

import contextlib
import os
import sys

from megatron_dattn.errors import EXIT_USER_ERROR, UserError
from megatron_dattn.runtime.error_file import write_error_file
from megatron_dattn.runtime.launcher import Launch


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
        from megatron_dattn.runtime.distributed import share_refusal

        error = share_refusal(error)
    return report_error(launch, str(error), EXIT_USER_ERROR)


def give_up_unwritable_output() -> None:
    """Send what standard output and error cannot take to nowhere; the last thing before the end.

    Python writes out both when it ends. Where that fails, on a full disk or behind a reader that is
    gone, it would end with 120 in place of the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
