"""A tool ends in one line, whatever ends it; bars are for whoever watches a terminal."""

import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from megatron_dattn.errors import DataError
from megatron_dattn.runtime.progress import unseen
from megatron_dattn.runtime.tool import bar, run_tool

ROOT = Path(__file__).resolve().parents[3]


def raising(error: BaseException) -> Callable[[], int]:
    def work() -> NoReturn:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("no file"), "error: no file"),
        (PermissionError(13, "Permission denied", "f"), "error: Permission denied: 'f'"),
        (MemoryError(), "error: not enough memory"),
        (OSError(errno.EMFILE, "Too many open files"), "error: Too many open files (this process"),
    ],
)
def test_an_error_is_one_line(
    capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    assert run_tool(raising(error)) == 2
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.count("\n") == 1


def test_a_bug_stays_a_bug() -> None:
    with pytest.raises(TypeError, match="a bug"):
        run_tool(raising(TypeError("a bug")))
    assert run_tool(lambda: 1) == 1


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "interrupted; x was not written\n"),
        (signal.SIGTERM, 143, "interrupted by SIGTERM; x was not written\n"),
    ],
)
@pytest.mark.parametrize("hidden", [False, True])
def test_a_signal_is_one_line(
    capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int, line: str, hidden: bool
) -> None:
    """Also where a library's import makes another error of it; what was begun is cleaned up."""
    before = signal.getsignal(number)
    cleaned: list[bool] = []

    def work() -> int:
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            if hidden:
                raise ImportError("initialization failed") from None
            raise
        finally:
            cleaned.append(True)
        return 0

    assert run_tool(work, lambda: "; x was not written" * cleaned[0]) == code
    assert capsys.readouterr().err == line
    assert signal.getsignal(number) == before


def test_an_answer_that_cannot_be_written_is_an_error() -> None:
    code = (
        "import sys\n"
        "from megatron_dattn.runtime.tool import run_tool\n"
        "sys.exit(run_tool(lambda: print('the answer') or 0))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": ""},
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: No space left on device")
    assert done.stderr.count("\n") == 1


def test_what_nohup_has_switched_off_stays_off() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run_tool(lambda: os.kill(os.getpid(), signal.SIGINT) or 5) == 5
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("tool", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_every_tool_has_this_frame_and_is_quick_to_reach_it(tool: str) -> None:
    """An interrupt before it, while modules are imported, would be a traceback."""
    source = (ROOT / "tools" / tool).read_text()
    assert "return run_tool(" in source
    imported = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "tools" / tool, "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ).stderr
    names = {line.rpartition("|")[2].strip() for line in imported.splitlines()}
    assert not names & {"torch", "transformers", "matplotlib", "megatron", "numpy"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_a_pass(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    with bar("exporting", 4000) as advance:
        advance(1000)
        advance(3000)
    return stream.getvalue()


def test_a_terminal_shows_what_is_done_of_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run_a_pass(Terminal(), monkeypatch)
    assert "exporting: 100%" in shown
    assert "4.00k/4.00k" in shown


def test_a_file_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not run_a_pass(io.StringIO(), monkeypatch)
    with unseen("exporting", 4000) as advance:
        advance(1000)
