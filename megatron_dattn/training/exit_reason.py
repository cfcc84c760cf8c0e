"""How a run ends, and the file that says so.

A launcher hides the exit codes of its children (torchrun ends with 1 whatever they were), so the
reason is written as `exit_reason.json` into the save folder: a batch script reads it to decide
whether to start the run again. A folder that holds another run's checkpoints, or another program's
files, is not written into.
"""

import json
import logging
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_dattn.checkpoint.files import replace_synced
from megatron_dattn.errors import (
    EXIT_USER_ERROR,
    MAX_MESSAGE,
    OutageError,
    UserError,
    shortened,
)
from megatron_dattn.runtime.distributed import rank
from megatron_dattn.runtime.lost_ranks import LostRankError
from megatron_dattn.runtime.os_errors import explain, shortage
from megatron_dattn.runtime.rendezvous import RendezvousError
from megatron_dattn.runtime.signals import EXIT_INTERRUPTED

logger = logging.getLogger(__name__)

EXIT_NUMERICS = 17
EXIT_RENDEZVOUS = 18
EXIT_LOST_RANK = 19
FILE_NAME = "exit_reason.json"

Reason = Literal[
    "finished",
    "signal",
    "interrupted",
    "numerics",
    "user_error",
    "rendezvous",
    "lost_rank",
    "crash",
]

_EXIT_CODES: dict[str, int] = {
    "finished": 0,
    "signal": 0,
    "interrupted": EXIT_INTERRUPTED,
    "numerics": EXIT_NUMERICS,
    "user_error": EXIT_USER_ERROR,
    "rendezvous": EXIT_RENDEZVOUS,
    "lost_rank": EXIT_LOST_RANK,
    "crash": 1,
}


class NumericsError(RuntimeError):
    """Loss or gradients stay non-finite: more steps would not help."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class ExitReason:
    """Why a run ended.

    `finished`: all steps done. `signal`: asked to stop, state saved (or not begun: without a step,
    there was none to save). `interrupted`: by a second SIGINT, nothing saved since the last
    checkpoint. `numerics`: too many non-finite steps in a row. `user_error`: a setting, a file or
    the data must be mended. `rendezvous`: the ranks did not meet. `lost_rank`: one of them does not
    answer any more. `crash`: a lost data worker, a file system that does not answer, an error that
    nobody foresaw. After the last three another try may succeed.
    """

    reason: Reason
    step: int | None = None
    """Steps done, over all runs of this stage; None if that is not known."""
    detail: str = ""
    is_shared: bool = True
    """Whether all ranks end so, and rank 0 says it for them; not in the file."""

    @property
    def exit_code(self) -> int:
        return _EXIT_CODES[self.reason]


def ending_of(error: Exception) -> ExitReason:
    """The ending that an error of a run stands for."""
    if isinstance(error, RendezvousError):
        return ExitReason("rendezvous", detail=str(error), is_shared=error.shared)
    if isinstance(error, OutageError):
        return ExitReason("crash", detail=str(error))
    if isinstance(error, LostRankError):
        return ExitReason("lost_rank", detail=str(error), is_shared=False)
    if isinstance(error, UserError):
        return ExitReason("user_error", detail=str(error))
    if isinstance(error, NumericsError):
        return ExitReason("numerics", error.step, str(error))
    return ExitReason("crash", detail=f"{type(error).__name__}: {first_line(error)}")


def first_line(error: Exception) -> str:
    """The first line of an error, of reasonable length: torch's go on with C++ frames."""
    lines = str(error).strip().splitlines() or [""]
    return shortened(lines[0], MAX_MESSAGE)


def ending_of_one_rank(error: Exception) -> ExitReason | None:
    """The ending that a foreseeable failure of one rank alone stands for; None for any other.

    It strikes between two agreements of the ranks, where the others cannot be told.
    """
    words = shortage(error)
    if words is None:
        return None
    where = f"rank {rank()} on {socket.gethostname()}"
    return ExitReason("user_error", detail=f"{where}: {words}", is_shared=False)


def record_exit(folder: str | Path | None, ending: ExitReason) -> None:
    """Write the file, in one piece; call it on one rank. The folder is made if it is not there.

    A disk that refuses even this is only warned about: the ending itself is what matters.
    """
    if folder is None:
        return
    path = Path(folder) / FILE_NAME
    content = asdict(ending) | {"exit_code": ending.exit_code}
    del content["is_shared"]
    text = json.dumps(content, indent=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_synced(path, (text + "\n").encode())
    except OSError as error:
        logger.warning("%s cannot be written: %s", path, explain(error, path))


def clear_exit_reason(folder: str | Path) -> None:
    """Remove a former run's file: if this run dies without a word, none is left."""
    (Path(folder) / FILE_NAME).unlink(missing_ok=True)
