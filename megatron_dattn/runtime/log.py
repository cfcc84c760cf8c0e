"""Logging of a distributed run: rank 0 tells the story, the other ranks only complain.

Lines are plain and greppable: `[2026-01-31 12:00:00] message`, with the level in front of the
message above INFO, and `[rank 3]` for every rank but the first.
"""

import logging
import os
import sys
import warnings
from typing import TextIO

# Their INFO lines (and transformers' warnings about generation) say nothing about the run.
_NOISY_LOGGERS = ("megatron.core", "megatron.energon", "transformers", "torch", "PIL", "matplotlib")

_seen: set[tuple[str, int, str]] = set()


class _LineFormatter(logging.Formatter):
    def __init__(self, rank: int) -> None:
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S")
        self._prefix = "" if rank == 0 else f"[rank {rank}] "

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname} "
        return f"[{self.formatTime(record, self.datefmt)}] {self._prefix}{level}{record.message}"


def setup_logging(rank: int = 0, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send all log records of this process to one stream, stdout unless told otherwise.

    Ranks other than 0 only show warnings and worse. Python warnings become log lines of rank 0.
    Calling it again replaces the former set-up.
    """
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(_LineFormatter(rank))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level if rank == 0 else logging.WARNING)
    logging.captureWarnings(True)
    # Every rank meets the same Python warnings: once is enough.
    logging.getLogger("py.warnings").setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    quiet_libraries()


def quiet_libraries() -> None:
    """Let libraries speak from WARNING on (transformers from ERROR on)."""
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    # transformers sets its level at its first use, from this variable.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)


def silence_import_warnings() -> None:
    """Hide the notices of megatron-core's import that Transformer Engine and apex are missing.

    They are true and harmless where there is no GPU. It only helps before the import.
    """
    for message in (
        r"Transformer Engine and Apex are not installed",
        r"Apex is not installed. Falling back to Torch Norm",
    ):
        warnings.filterwarnings("ignore", message=message, module=r"megatron\.core")


def log_once(logger: logging.Logger, level: int, message: str) -> None:
    """Log a message at its first occurrence in this process only."""
    key = (logger.name, level, message)
    if key not in _seen:
        _seen.add(key)
        logger.log(level, message)
