"""How a run ends, and the file that says so.

A launcher hides the exit codes of its children (torchrun ends with 1 whatever they were), so the
reason is written as `exit_reason.json` into the save folder: a batch script reads it to decide
whether to queue the run again.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_dattn.checkpoint.files import replace_synced
from megatron_dattn.errors import EXIT_USER_ERROR
from megatron_dattn.runtime.distributed import is_rank_0

logger = logging.getLogger(__name__)

EXIT_NUMERICS = 17
FILE_NAME = "exit_reason.json"

Reason = Literal["finished", "signal", "numerics", "user_error"]

_EXIT_CODES: dict[str, int] = {
    "finished": 0,
    "signal": 0,
    "numerics": EXIT_NUMERICS,
    "user_error": EXIT_USER_ERROR,
}


class NumericsError(RuntimeError):
    """Loss or gradients stay non-finite: more steps would not help."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class ExitReason:
    """Why a run ended.

    `finished`: all steps done. `signal`: asked to stop, state saved. `numerics`: too many
    non-finite steps in a row. `user_error`: a setting, a file or the data must be mended.
    """

    reason: Reason
    step: int | None = None
    """Steps done, over all runs of this stage; None if that is not known."""
    detail: str = ""

    @property
    def exit_code(self) -> int:
        return _EXIT_CODES[self.reason]


def record_exit(folder: str | Path | None, ending: ExitReason) -> None:
    """Write the file on rank 0, in one piece; the folder is made if it is not there.

    A disk that refuses even this is only warned about: the ending itself is what matters.
    """
    if folder is None or not is_rank_0():
        return
    path = Path(folder) / FILE_NAME
    text = json.dumps({**asdict(ending), "exit_code": ending.exit_code}, indent=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_synced(path, (text + "\n").encode())
    except OSError as error:
        logger.warning("%s cannot be written: %s", path, error)


def clear_exit_reason(folder: str | Path) -> None:
    """Remove a former run's file: if this run dies without a word, none is left."""
    (Path(folder) / FILE_NAME).unlink(missing_ok=True)
