"""CPU time of the imports before a run without a GPU can begin.

    python -m benchmarks.bench_imports --output benchmarks/imports_cpu.md

They are those of `pretrain_vlm.py`, in processes of their own, with megatron-core as this program
imports it (`runtime/engine_imports.py`) or as it imports itself. The clock is the CPU time of the
process, which other work on the machine leaves nearly alone.
"""

import argparse
import resource
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.protocol import FEWEST_ROUNDS, Step, time_on_host, time_rounds
from megatron_dattn.runtime.tool import ToolParser

_START = """
from megatron_dattn.runtime.log import silence_import_warnings
silence_import_warnings()
from megatron_dattn.training import pretrain
"""
STARTS = {
    "megatron-core as it imports itself": f"import megatron.core\n{_START}",
    "as this program imports it": _START,
}


def imports_report(arguments: argparse.Namespace) -> str:
    """Measure everything; the whole Markdown file."""
    steps = {name: partial(_start, code) for name, code in STARTS.items()}
    timings = time_rounds(steps, rounds=arguments.rounds, timer=_time_of_children, warm_up=1)
    base = next(iter(steps))
    notes = [
        report.rounds_note(timings.num_rounds, arguments.rounds, 1).replace(
            "one process", "a process each"
        ),
        f"noise floor: {report.spread(timings.noise)}",
    ]
    head = report.header("The imports of a run", arguments.command, torch.device("cpu"), notes)
    rows = [
        [
            name,
            report.spread(timings.milliseconds(name), 0),
            report.spread(timings.ratio(name, base)),
        ]
        for name in steps
    ]
    return f"{head}\n\n{report.table(['what', 'CPU ms', 'of the first'], rows)}"


def _start(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)


def _time_of_children(step: Step) -> float:
    return time_on_host(step, _cpu_of_children)


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; `command` is what to type to repeat it."""
    parser = ToolParser(__doc__, prog="python -m benchmarks.bench_imports")
    parser.add_argument("--rounds", type=int, default=FEWEST_ROUNDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="Markdown file; printed in any case")
    parsed = parser.parse_args(arguments)
    parsed.command = f"{parser.prog} {shlex.join(arguments)}"
    return parsed


def main(arguments: list[str] | None = None) -> int:
    return report.run(imports_report, parse(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
