"""Preparing, checking and loading a large data set with every defect planted.

    python -m benchmarks.bench_check_data --records 200000 --output benchmarks/check_data_cpu.md

The set is made first (`tests/support/planted_defects.py`): images of 64 pixels, so that the time is
that of the records rather than of decoding. Each tool runs as a process of its own, by the command
that a user types. CPU seconds are those of all processes together: on a machine with other work
they say what an idle one would take. Memory is that of its processes together at the peak, read
every 50 ms, pages that several share counted once. What the check finds and what a loader counts
over one epoch must be what was planted, or there is no report.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from benchmarks import report
from megatron_dattn.data.config import DataConfig, DatasetConfig
from megatron_dattn.data.encoder import ModelSizes
from megatron_dattn.data.loader import build_loader
from megatron_dattn.errors import EXIT_USER_ERROR
from megatron_dattn.runtime.tool import ToolParser
from tests.support.planted_defects import MAX_PIXELS, POLICIES, Planted, plant
from tests.unit.data.builders import save_processor

_ROOT = Path(__file__).resolve().parents[1]
_IMAGE_SIZE, _PATCH_SIZE, _VOCAB_SIZE = 16, 8, 512
_POLL_SECONDS = 0.05
_RECORDS_OF_A_DEFECT = 2000  # one in so many


def check_data_report(arguments: argparse.Namespace) -> str:
    """Measure everything; the whole Markdown file.

    Raises:
        RuntimeError: a tool fails, or something else is found than was planted.
    """
    with _folder(arguments.folder) as folder:
        each = max(1, arguments.records // _RECORDS_OF_A_DEFECT)
        planted = plant(folder, arguments.records, each=each)
        (folder / "set.json").write_text(json.dumps(planted.records))
        costs = _run_tools(folder, arguments.workers)
        if not arguments.no_epoch:
            costs["an epoch of the loader, one process"] = _load_an_epoch(folder, planted)
        _require_found(json.loads((folder / "report.json").read_text())["files"][0], planted)
        by_both = "" if arguments.no_epoch else ", by the check and by the loader"
        notes = [
            f"{arguments.records} records, of which {len(planted.unused)} are not to be used and "
            f"{planted.fixed.total()} fixed; {_megabytes(folder / 'images')} of images; "
            f"{arguments.workers} processes that check",
            f"what is found, skipped and fixed is exactly what was planted{by_both}",
        ]
    head = report.header("Checking a data set", arguments.command, torch.device("cpu"), notes)
    rows = [[name, *cost.cells(arguments.records)] for name, cost in costs.items()]
    columns = ["what", "seconds", "CPU seconds", "records per second", "MB at the peak"]
    return f"{head}\n\n{report.table(columns, rows)}"


@dataclass(frozen=True)
class Cost:
    """What one run of a tool takes."""

    seconds: float
    cpu_seconds: float
    megabytes: float | None = None
    """At its peak; None where it is shared with other work."""

    def cells(self, records: int) -> list[str]:
        """As figures of a table."""
        speed = f"{records / self.seconds:.0f}"
        memory = "" if self.megabytes is None else f"{self.megabytes:.0f}"
        return [f"{self.seconds:.1f}", f"{self.cpu_seconds:.1f}", speed, memory]


def _run_tools(folder: Path, workers: int) -> dict[str, Cost]:
    """Prepare the set, check it, and prepare what the check leaves of it."""
    save_processor(folder / "processor")
    config, listed = str(_write_config(folder)), str(folder / "bad.jsonl")
    source, output = str(folder / "set.json"), "--output"
    outputs = ["--report", str(folder / "report.json"), "--html", str(folder / "page.html")]
    outputs += ["--list", listed, "--list-duplicates"]
    check = [source, "--config", config, "--workers", str(workers), *outputs]
    clean = [source, output, str(folder / "clean"), "--without", listed]
    return {
        "prepare_data.py": _run("prepare_data.py", [source, output, str(folder / "prepared")], 0),
        "check_data.py": _run("check_data.py", check, EXIT_USER_ERROR),
        "prepare_data.py --without --validation-share": _run(
            "prepare_data.py", [*clean, "--validation-share", "0.01"], 0
        ),
    }


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """The folder of the data set, removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="check_data_", dir=given))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def _write_config(folder: Path) -> Path:
    settings = {
        "tokenizer": str(folder / "processor"),
        "visual_budget": 16,
        "text_budget": 256,
        "max_image_pixels": MAX_PIXELS,
        "policies": POLICIES,
    }
    model = {"vision": {"image_size": _IMAGE_SIZE, "patch_size": _PATCH_SIZE}}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"model": model, "data": settings}))
    return path


def _run(tool: str, arguments: list[str], expected: int) -> Cost:
    """Run a tool. Raises RuntimeError if it ends otherwise than expected."""
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    command = [sys.executable, str(_ROOT / "tools" / tool), *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    done, peak = 0, 0
    while not done:
        # Not the usage's own maximum: it begins with what this process has, which forks.
        peak = max(peak, _bytes_of(process.pid))
        time.sleep(_POLL_SECONDS)
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != expected:
        raise RuntimeError(f"{tool} ended with {process.returncode} instead of {expected}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, peak / 1e6)


def _bytes_of(pid: int) -> int:
    """Memory of a process and all below it."""
    total = 0
    with suppress(psutil.Error):  # it has just ended
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += each.memory_full_info().pss
    return total


def _load_an_epoch(folder: Path, planted: Planted) -> Cost:
    """Load all records once. Raises RuntimeError if other ones are skipped than were planted."""
    settings = DataConfig(
        tokenizer=str(folder / "processor"),
        visual_budget=16,
        text_budget=256,
        max_image_pixels=MAX_PIXELS,
        policies=POLICIES,
    )
    side = _IMAGE_SIZE // _PATCH_SIZE
    loader = build_loader(
        settings,
        datasets=[DatasetConfig(str(folder / "prepared" / "set.jsonl"), str(folder))],
        sizes=ModelSizes(_IMAGE_SIZE, (side, side), _VOCAB_SIZE),
        micro_batch_size=4,
        data_parallel_rank=0,
        data_parallel_size=1,
        seed=0,
        training=False,
    )
    started = time.perf_counter(), time.process_time()
    used = sum(batch.num_samples for batch in loader)
    cost = Cost(time.perf_counter() - started[0], time.process_time() - started[1])
    counters = loader.counters()
    _require_equal("used", used, len(planted.records) - len(planted.unused))
    _require_equal("skipped", counters.skipped, dict(planted.skipped))
    _require_equal("fixed", counters.fixed, dict(planted.fixed))
    return cost


def _require_found(figures: dict[str, Any], planted: Planted) -> None:
    _require_equal("skipped by the check", figures["skipped"], dict(planted.skipped))
    _require_equal("fixed by the check", figures["fixed"], dict(planted.fixed))
    _require_equal("records", figures["records"], len(planted.records))
    _require_equal("repeated records", figures["duplicate_records"], len(planted.repeated))
    _require_equal("repeated ids", figures["duplicate_ids"], len(planted.repeated_ids))


def _require_equal(what: str, found: object, planted: object) -> None:
    if found != planted:
        raise RuntimeError(f"{what}: found {found}, planted {planted}")


def _megabytes(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 1e6:.0f} MB"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; `command` is what to type to repeat it."""
    parser = ToolParser(__doc__, prog="python -m benchmarks.bench_check_data")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=cores, help="processes that check")
    parser.add_argument("--no-epoch", action="store_true", help="leave out the loader")
    parser.add_argument("--folder", type=Path, help="where the data set is made and removed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="Markdown file; printed in any case")
    parsed = parser.parse_args(arguments)
    parsed.command = f"{parser.prog} {shlex.join(arguments)}"
    return parsed


def main(arguments: list[str] | None = None) -> int:
    return report.run(check_data_report, parse(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
