"""Results as Markdown: a header that lets anybody repeat the measurement, and tables."""

import importlib.metadata
import platform
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch

from benchmarks.protocol import FEWEST_ROUNDS, Spread
from megatron_dattn.errors import UserError
from megatron_dattn.runtime.distributed import destroy_distributed
from megatron_dattn.runtime.log import setup_logging
from megatron_dattn.runtime.tool import run_tool

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn")
_ROOT = Path(__file__).resolve().parents[1]


def header(title: str, command: str, device: torch.device, notes: Sequence[str] = ()) -> str:
    """Title, machine, versions, commit, command, date, and what else must be said."""
    lines = [
        f"machine: {_machine(device)}",
        f"versions: Python {platform.python_version()}, {_versions()}",
        f"commit: {_commit()}",
        f"command: `{command}`",
        f"date: {date.today().isoformat()}",
        *notes,
    ]
    return "\n".join([f"# {title}", "", *(f"- {line}" for line in lines)])


def rounds_note(num_rounds: int, asked: int, warm_up: int) -> str:
    """Say how many rounds were run, and whether that is a measurement."""
    text = f"{num_rounds} rounds after {warm_up} steps of warm-up each, one process"
    if num_rounds < asked:
        text += f" (of {asked}: the time was up)"
    if num_rounds < FEWEST_ROUNDS:
        text += f"; **fewer than {FEWEST_ROUNDS} rounds are no measurement**"
    return text


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    assert all(len(row) == len(columns) for row in rows), "a row for every column"
    rule = ["---", *("---:" for _ in columns[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rule, *rows))


def spread(figure: Spread, digits: int = 2) -> str:
    """1.31 (1.25 to 1.40)"""
    median, low, high = (
        f"{value:.{digits}f}" for value in (figure.median, figure.low, figure.high)
    )
    return f"{median} ({low} to {high})"


def run(make: Callable[[Namespace], str], parsed: Namespace) -> int:
    """Make a report and keep it: what all benchmarks do; returns the exit code.

    Args:
        parsed: the command line, with `output` and, where the benchmark has them, `threads`.
    """

    def work() -> int:
        try:
            if "threads" in parsed:
                set_threads(parsed.threads)
            write(make(parsed), parsed.output)
            return 0
        finally:
            destroy_distributed()

    setup_logging(stream=sys.stderr, level="WARNING")
    return run_tool(work)


def write(text: str, output: Path | None) -> None:
    """Print the report and keep it where that is wanted. Raises UserError if it cannot be."""
    print(text)
    if output is None:
        return
    try:
        output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None


def choose_device(name: str) -> torch.device:
    """The device called `name`, or with "auto" the one that the engine uses.

    The engine runs on the GPU wherever there is one, so the other cannot be asked for.

    Raises:
        UserError: the device is absent, or not the engine's.
    """
    engine = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("auto", engine):
        remedy = "hide the GPU with CUDA_VISIBLE_DEVICES=''" if engine == "cuda" else "leave it out"
        raise UserError(f"--device {name}: the engine runs on {engine} here; {remedy}")
    return torch.device(engine)


def set_threads(count: int) -> None:
    """Of the host. Raises UserError for none."""
    if count < 1:
        raise UserError(f"--threads must be at least 1, got {count}")
    torch.set_num_threads(count)


def _machine(device: torch.device) -> str:
    threads = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(device), _driver()
        return f"{name}, driver {driver}, CUDA {torch.version.cuda}; {_processor()}, {threads}"
    return f"{_processor()}, {threads}, {platform.system()}"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _driver() -> str:
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"])


def _commit() -> str:
    commit = _output(["git", "rev-parse", "--short", "HEAD"])
    return commit + (
        " and changes" if _output(["git", "status", "--porcelain", "-uno"], "") else ""
    )


def _output(command: list[str], otherwise: str = "unknown") -> str:
    try:
        ended = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return otherwise
    return ended.stdout.strip()


def _versions() -> str:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
