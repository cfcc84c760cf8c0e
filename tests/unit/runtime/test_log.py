"""The log lines of rank 0 and of the others."""

import errno
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator

import pytest
import torch

from megatron_dattn.runtime.log import quiet_libraries, setup_logging, silence_import_warnings

TIME = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\]"


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    names = ["", "py.warnings", "transformers", "megatron.core"]
    levels = {name: logging.getLogger(name).level for name in names}
    root = logging.getLogger()
    handlers = list(root.handlers)
    # A command that another test called may have left the redirection on, which pytest undid.
    logging.captureWarnings(False)
    with warnings.catch_warnings():
        yield
        logging.captureWarnings(False)
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def lines(rank: int) -> list[str]:
    stream = io.StringIO()
    warnings.simplefilter("always")
    setup_logging(rank, stream=stream)
    logger = logging.getLogger("megatron_dattn.test")
    logger.debug("details")
    logger.info("iteration 10 | loss 1.5")
    logger.warning("slow disk")
    logging.getLogger("megatron.core.optimizer").info("Setting up optimizer")
    warnings.warn("old name", stacklevel=1)
    return stream.getvalue().splitlines()


def test_rank_0_prints_plain_lines() -> None:
    first, second, third, *_ = lines(0)
    assert re.fullmatch(TIME + r" iteration 10 \| loss 1\.5", first)
    assert re.fullmatch(TIME + " WARNING slow disk", second)
    assert "old name" in third


def test_other_ranks_only_warn() -> None:
    (only,) = lines(3)
    assert re.fullmatch(TIME + r" \[rank 3\] WARNING slow disk", only)


def test_set_up_again_does_not_repeat_lines() -> None:
    lines(0)
    assert sum("iteration 10" in line for line in lines(0)) == 1


def shown(message: str, module: str, category: type[Warning] = UserWarning) -> bool:
    """Whether a warning given in a module comes through the present filters."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn_explicit(message, category, f"{module}.py", 1, module=module)
    return bool(caught)


def test_filters_are_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    warnings.resetwarnings()
    silence_import_warnings()
    quiet_libraries()
    missing = "Transformer Engine and Apex are not installed. Falling back to Torch optimizers."
    assert not shown(missing, "megatron.core.optimizer")
    assert shown(missing, "another.package")
    assert shown("Transformer Engine is broken", "megatron.core.optimizer")
    renamed = "`torch.distributed.all_gather_into_tensor` is deprecated. Please use another."
    assert not shown(renamed, "torch.distributed.c10d_logger", FutureWarning)
    assert shown("`torch.distributed.send` is deprecated", "torch.distributed.c10d_logger")


def test_notices_to_engine_developers_are_dropped_and_other_records_kept() -> None:
    stream = io.StringIO()
    setup_logging(3, stream=stream)
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    logger.warning("GPTModel IS DEPRECATED. GPTModel is only accepting critical bug fixes")
    logger.warning("the embedding is too small")
    assert re.fullmatch(
        TIME + r" \[rank 3\] WARNING the embedding is too small\n", stream.getvalue()
    )


def test_missing_gpu_packages_are_mentioned_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    warnings.resetwarnings()
    silence_import_warnings()
    assert shown("Transformer Engine and Apex are not installed.", "megatron.core.optimizer")


@pytest.mark.parametrize(
    ("encoding", "written"), [("utf-8", "d\\udcff\u00e9"), ("ascii", "d\\udcff\\xe9")]
)
def test_names_that_are_no_text_are_written_as_escapes(encoding: str, written: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    setup_logging(stream=stream)
    logging.getLogger("megatron_dattn.test").info("reading d\udcff\u00e9")
    stream.seek(0)
    assert written in stream.read()


class FullFor(io.StringIO):
    """A stream whose next writes fail."""

    failing = 0

    def write(self, text: str) -> int:
        if self.failing > 0:
            self.failing -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(text)


def test_lines_that_cannot_be_written_are_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    stream = FullFor()
    setup_logging(stream=stream)
    logger = logging.getLogger("megatron_dattn.test")
    logger.info("before")
    stream.failing = 3
    for number in range(3):
        logger.info("lost %d", number)
    logger.info("after")
    told = capfd.readouterr().err
    assert told.startswith("warning: log lines cannot be written: No space left on device")
    assert told.count("\n") == 1
    assert re.sub(TIME, "T", stream.getvalue()).splitlines() == [
        "T before",
        "T after",
        "... 3 log lines could not be written in time",
    ]
