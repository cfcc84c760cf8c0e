"""Convert a checkpoint of real size and compare with copying its files: time, and peak memory.

    python -m benchmarks.bench_conversion --folder /scratch/conversion --output conversion.md

Random weights of Mistral-7B-v0.3 and SigLIP so400m (15 GB) are made first; three times that room is
needed. `--layers 2` makes a small one. Copy and conversions alternate, each from cold files (their
pages are dropped before) to synced ones. `copy` is shutil's, through the page cache; `copy by
blocks` drops the pages behind itself, as the converter does. A conversion is the whole command in a
process of its own, start-up included (the dry run is little else); its peak is the kernel's VmHWM,
which counts mapped file pages too. What is exported is the import with an adapter added, which is
not timed.
"""

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.protocol import Spread
from megatron_dattn.checkpoint.files import PAGES_KEPT, forget_pages
from megatron_dattn.errors import UserError
from megatron_dattn.runtime.log import silence_import_warnings

silence_import_warnings()  # before megatron-core is imported

from benchmarks.random_checkpoint import (  # noqa: E402
    MISTRAL,
    RandomCheckpoint,
    add_adapter,
    write_random_checkpoint,
)
from megatron_dattn.runtime.tool import ToolParser  # noqa: E402

_ROOT = Path(__file__).resolve().parents[1]
_TOOL = _ROOT / "tools" / "convert_checkpoint.py"
_POLL_SECONDS = 0.05
_COPY, _BLOCKS, _DRY_RUN = "copy", "copy by blocks", "import --dry-run"
_IMPORT, _EXPORT = "import", "export"


@dataclass(frozen=True)
class Measured:
    """One run of one variant."""

    seconds: float
    peak_bytes: int | None = None


def conversion_report(arguments: argparse.Namespace) -> str:
    """Measure everything; the whole Markdown file."""
    folder: Path = arguments.folder
    load = f"{os.getloadavg()[0]:.1f} before the start, on {os.cpu_count()} CPUs"
    if folder.exists():
        raise UserError(f"--folder {folder} exists; name a new one, it is removed in the end")
    try:
        language = replace(MISTRAL, num_hidden_layers=arguments.layers)
        shard_bytes = int(arguments.shard_gb * 1e9)
        made = write_random_checkpoint(folder, language=language, shard_bytes=shard_bytes)
        rounds = [measure_round(made, folder) for _ in range(arguments.rounds)]
        results = {name: [measured[name] for measured in rounds] for name in rounds[0]}
        notes = [
            f"{len(made.files)} shards, {made.num_bytes / 1e9:.2f} GB, BF16; language model of "
            f"{arguments.layers} layers",
            f"rounds: {arguments.rounds}; cold files, synced to the disk; load average {load}",
        ]
        head = report.header(
            "Conversion of a checkpoint", arguments.command, torch.device("cpu"), notes
        )
        return f"{head}\n\n{result_table(results, made.num_bytes)}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure_round(made: RandomCheckpoint, folder: Path) -> dict[str, Measured]:
    """Every variant once; the folder holds what it held before."""
    measured = {
        _COPY: copy_files(made, folder / "copy", shutil.copyfile),
        _BLOCKS: copy_files(made, folder / "copy", copy_by_blocks),
    }
    imported, trained, exported = (folder / name for name in ("imported", "trained", "exported"))
    measured[_DRY_RUN] = run_import(made, imported, "--dry-run")
    measured[_IMPORT] = run_import(made, imported)
    if importlib.util.find_spec("megatron_dattn.conversion.hf_export.run"):
        add_adapter(imported, trained)
        shutil.rmtree(imported)
        drop_pages([file for file in trained.rglob("*") if file.is_file()])
        command = [str(_TOOL), "export", "--checkpoint", str(trained), "--output", str(exported)]
        measured[_EXPORT] = run_watched(command)
    for made_here in (imported, trained, exported):
        shutil.rmtree(made_here, ignore_errors=True)
    return measured


def copy_files(
    made: RandomCheckpoint, target: Path, copy: Callable[[Path, Path], object]
) -> Measured:
    """Copy and sync every shard; the copies are removed again."""
    drop_pages(made.files)
    target.mkdir()
    started = time.perf_counter()
    for number, file in enumerate(made.files):
        copy(file, target / str(number))
    for copied in target.iterdir():
        _sync(copied)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return Measured(seconds)


def copy_by_blocks(source: Path, target: Path) -> None:
    """Copy a file and let none of it stay in the page cache."""
    block = bytearray(PAGES_KEPT)
    with open(source, "rb") as reader, open(target, "xb") as writer:
        while count := reader.readinto(block):
            writer.write(memoryview(block)[:count])
            for file in (reader, writer):
                forget_pages(file.fileno())


def run_import(made: RandomCheckpoint, target: Path, *options: str) -> Measured:
    """The command in a process of its own."""
    drop_pages(made.files)
    inputs = ["--vision", str(made.vision), "--language", str(made.language)]
    return run_watched([str(_TOOL), "import", *inputs, "--output", str(target), *options])


def run_watched(command: list[str]) -> Measured:
    """Run a Python script to its end and watch its memory.

    Raises:
        UserError: it failed; its own message has been printed.
    """
    path = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command], env={**os.environ, "PYTHONPATH": path}, stdout=sys.stderr
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, _peak_of(process.pid))
        time.sleep(_POLL_SECONDS)
    if process.returncode:
        raise UserError(f"`{shlex.join(command)}` ended with {process.returncode}")
    return Measured(time.perf_counter() - started, peak)


def _peak_of(process: int) -> int:
    """Bytes; 0 where there is no Linux to ask, or nothing left of the process."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def drop_pages(files: list[Path]) -> None:
    """Let the kernel forget the files' contents, so that the next reader meets the disk."""
    for file in files:
        _sync(file)  # pages that wait to be written are not dropped
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sync(file: Path) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def result_table(results: dict[str, list[Measured]], num_bytes: int) -> str:
    """Time, speed relative to the copy of the same round, and peak memory of every variant."""
    columns = ["variant", "seconds (min to max)", "GB/s", "copy's time over this (min to max)"]
    columns.append("peak resident GB")
    rows = []
    for name, runs in results.items():
        seconds = Spread.of([run.seconds for run in runs])
        ratios = [c.seconds / run.seconds for c, run in zip(results[_COPY], runs, strict=True)]
        peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
        moves = name != _DRY_RUN
        row = [
            name,
            report.spread(seconds, digits=1),
            f"{num_bytes / 1e9 / seconds.median:.2f}" if moves else "",
            report.spread(Spread.of(ratios)) if moves else "",
            f"{max(peaks) / 1e9:.2f}" if peaks else "",
        ]
        rows.append(row)
    return report.table(columns, rows)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; `command` is what to type to repeat it."""
    parser = ToolParser(__doc__, prog="python -m benchmarks.bench_conversion")
    parser.add_argument("--folder", type=Path, required=True, help="new; removed in the end")
    parser.add_argument("--layers", type=int, default=MISTRAL.num_hidden_layers)
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest size of a shard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="Markdown file; printed in any case")
    parsed = parser.parse_args(arguments)
    parsed.command = f"{parser.prog} {shlex.join(arguments)}"
    return parsed


def main(arguments: list[str] | None = None) -> int:
    return report.run(conversion_report, parse(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
