"""Logging of a distributed run: rank 0 tells the story, the other ranks only complain.

Lines are plain and greppable: `[2026-01-31 12:00:00] message`, with the level in front of the
message above INFO, and `[rank 3]` for every rank but the first.
"""

import contextlib
import io
import logging
import os
import sys
import warnings
from typing import TextIO

from megatron_dattn.runtime.os_errors import explain

# Their INFO lines (and transformers' warnings about generation) say nothing about the run.
_NOISY_LOGGERS = ("megatron.core", "megatron.energon", "transformers", "torch", "PIL", "matplotlib")

# Warnings of libraries about their own inner calls: nothing that a user could act upon.
_HARMLESS_WARNINGS = (
    # Of damaged notes in images, one for each entry: thousands for a file that means it.
    ("", r"PIL\."),
    # transformer_config.py:1705 about the default of its own field.
    ("full scope is deprecated", r"megatron\.core\.transformer"),
    # optimizer.py:66 asks a view of a parameter for its gradient, and means it.
    (r"The \.grad attribute of a Tensor that is not a leaf", r"megatron\.core\.optimizer"),
    # torch's checkpoints ask each of their tensors whether it is of its own older kind.
    (r"Please use DTensor instead", r"torch\.distributed"),
    # param_and_grad_buffer.py and mappings.py use the old names of two collectives.
    (
        r"`torch\.distributed\.(reduce_scatter|all_gather_into)_tensor` is depr",
        r"torch\.distributed",
    ),
    # Of 0.19, whose optimizer looks at every model for this one's sake.
    ("MimoModelConfig is experimental", r"megatron\.core\.models\.mimo"),
)
# What 0.19 logs as warnings to those who build models from it: by logger, its beginning.
_HARMLESS_RECORDS = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec",
}
_WITHOUT_GPU_PACKAGES = (
    r"Transformer Engine and Apex are not installed",
    r"Apex is not installed\. Falling back to Torch Norm",
    # tensor_parallel/layers.py:730, advice for the order of CUDA streams.
    r".*CUDA_DEVICE_MAX_CONNECTIONS",
)


class _LineFormatter(logging.Formatter):
    def __init__(self, rank: int) -> None:
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S")
        self._prefix = "" if rank == 0 else f"[rank {rank}] "

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname} "
        return f"[{self.formatTime(record, self.datefmt)}] {self._prefix}{level}{record.message}"


class _Handler(logging.StreamHandler):
    """A stream that takes no more lines costs lines, never the run or a traceback for each.

    Standard error is told when it begins, and the stream itself when it is over.
    """

    _fails = False
    _failures = 0

    def emit(self, record: logging.LogRecord) -> None:
        before = self._failures
        super().emit(record)
        if self._fails and self._failures == before:
            self._fails = False
            self.stream.write(f"... {before} log lines could not be written in time\n")

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._failures += 1
        if not self._fails:
            self._fails = True
            told = f"warning: log lines cannot be written: {explain(error)}; the run goes on\n"
            with contextlib.suppress(OSError):
                os.write(2, told.encode(errors="replace"))


def setup_logging(rank: int = 0, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send all log records of this process to one stream, stdout unless told otherwise.

    Ranks other than 0 only show warnings and worse. Python warnings become log lines of rank 0.
    Calling it again replaces the former set-up.
    """
    stream = stream or sys.stdout
    escape_what_cannot_be_written(stream)
    handler = _Handler(stream)
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
    """Let libraries speak from WARNING on (transformers from ERROR on), without false alarms."""
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    # transformers sets its level at its first use, from this variable.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for message, module in _HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message, module=module)
    for name in _HARMLESS_RECORDS:
        logging.getLogger(name).addFilter(_says_something)


def _says_something(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_HARMLESS_RECORDS[record.name])


def silence_import_warnings() -> None:
    """Hide megatron-core's and torch's notices that what GPUs need is missing, where there is none.

    And a Transformer Engine on which its imports would fail, and what they need not import. Most
    notices are given when megatron-core is imported, so call it before that.
    """
    # Here, as torch takes a second: `setup_logging` does without.
    import torch

    from megatron_dattn.runtime.engine_imports import prepare_engine_imports

    prepare_engine_imports()
    if not torch.cuda.is_available():
        for message in _WITHOUT_GPU_PACKAGES:
            warnings.filterwarnings("ignore", message=message, module=r"megatron\.core")
        # Says so, too, for builds of torch with CUDA on a machine that has a CUDA compiler.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def escape_what_cannot_be_written(stream: TextIO) -> None:
    """From now on write characters that a stream's encoding lacks as escapes, `\\udcff`.

    A file's name may hold bytes that are no text; Python would end in the middle of a line.
    """
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


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
