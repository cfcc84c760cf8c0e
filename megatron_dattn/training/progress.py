"""A progress bar for somebody who watches a terminal; log files never see it."""

import contextlib
import logging
import sys
from typing import Literal

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_dattn.runtime.distributed import is_rank_0
from megatron_dattn.runtime.os_errors import explain

logger = logging.getLogger(__name__)


class ProgressBar:
    """Context manager around the training loop; log lines are printed above the bar."""

    def __init__(
        self, mode: Literal["auto", "on", "off"], *, first_step: int, last_step: int
    ) -> None:
        wanted = mode == "on" or (mode == "auto" and sys.stderr.isatty())
        self._steps = (first_step, last_step)
        self._enabled = wanted and is_rank_0()
        self._bar: tqdm | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "ProgressBar":
        if self._enabled:
            first, last = self._steps
            bar = tqdm(initial=first, total=last, unit="step", dynamic_ncols=True)
            self._bar = self._open.enter_context(bar)
            self._open.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()
        self._bar = None

    def advance(self, loss: float) -> None:
        """One step is done."""
        if self._bar is None:
            return
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        try:
            self._bar.update()
        except OSError as error:  # standard error goes to a full disk, or nowhere
            logger.warning("the progress bar ends: %s", explain(error, "standard error"))
            self._bar.disable = True
