"""What to learn of a GPU in its first minutes: tests, errors, times and memory, in eight minutes.

    python -m benchmarks.gpu_check --output runs/gpu_check
    python -m benchmarks.gpu_check --small        # the same parts on a CPU, at tiny sizes

Needs no network and no data. Each part is a process with a time limit, the most telling ones first;
after each of them gpu_check.md is written anew, so that an interruption costs one part. A part that
measures leaves NAME.md, which can go to benchmarks/ as it is; every part leaves NAME.log.

What an H100 is expected to take stands in the table: 15 s for a process to start, and steps at 40 %
of the card's peak (the roofline of benchmarks/step_roofline.py; layers at 50 %), about six minutes.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import report
from megatron_dattn.errors import EXIT_USER_ERROR
from megatron_dattn.runtime.tool import ToolParser

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 8.0
_LAYER = "one decoder layer, {} visual tokens: times, bounds, errors, peaks"
# Mistral-7B's layer; the features are SigLIP so400m's.
_WIDTH = "--hidden-size 4096 --heads 32 --kv-heads 8 --head-dim 128 --ffn 14336 --vision-size 1152"
_TINY = "--hidden-size 32 --heads 4 --kv-heads 2 --head-dim 8 --ffn 48 --text 16"
# Visual tokens and the seconds that they are expected to take; 9216 first: what the paper's
# comparison is about.
_EXPECTED = {9216: 30, 729: 18, 36864: 22, 73728: 28}


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    what: str
    arguments: list[str]
    """Of Python."""
    expected: int
    """Seconds on an H100, by its operations."""
    seconds: int
    """It is stopped after so long."""
    reports: bool = False
    """Whether it writes a Markdown file to `--output`."""


def parts(small: bool) -> list[Part]:
    """All parts in order; together they fit into `MINUTES`."""
    layers = (12,) if small else tuple(_EXPECTED)
    layer = f"{_TINY} --rounds 1" if small else f"{_WIDTH} --rounds 10 --seconds 6"
    layer += " --variants dattn s_attn --compared-up-to 10000"
    step = "--model demo --samples 2 --rounds 1" if small else "--rounds 10 --seconds 10"
    sizes = "--hidden-size 64 --layers 2 --questions 1 --answer-tokens 2 --rounds 1"
    answers = sizes if small else "--hidden-size 2048 --rounds 5 --seconds 5"
    return [
        _tests("training", "a few training steps, the entry script, the benchmark", (90, 105), [
            "tests/gpu/test_training_gpu.py", "tests/gpu/test_benchmarks_gpu.py",
        ]),
        # Of 128 values per head, as Mistral's; pytest -m gpu tests/gpu has the others.
        _tests("kernels", "every kernel against the float64 oracle, in BF16", (60, 90), [
            "tests/gpu/test_attention_gpu.py", "-k", "128 or not test_flash_stays_near",
        ]),
        _bench("step_dattn", "an 8-layer step: MFU, peak memory", (35, 45),
               f"bench_wide_step {step}"),
        *(
            _bench(f"layer_{visual}", _LAYER.format(visual), (_EXPECTED.get(visual, 5), 35),
                   f"bench_attention --visual {visual} {layer}")
            for visual in layers
        ),
        _bench("step_s_attn", "the same step with self-attention", (35, 45),
               f"bench_wide_step --attention s_attn {step}"),
        _bench("generation", "answers from pixels and from kept images, and whether they agree",
               (40, 55), f"bench_image_cache {answers}"),
    ]  # fmt: skip


def _tests(name: str, what: str, seconds: tuple[int, int], files: list[str]) -> Part:
    options = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short"]
    return Part(name, what, [*options, *files], *seconds)


def _bench(name: str, what: str, seconds: tuple[int, int], line: str) -> Part:
    module, *arguments = line.split()
    return Part(name, what, ["-m", f"benchmarks.{module}", *arguments], *seconds, reports=True)


def check(todo: Sequence[Part], folder: Path, minutes: float, command: str) -> bool:
    """Run the parts, as far as the time allows; True if all of them passed."""
    device, end = report.choose_device("auto"), time.monotonic() + 60 * minutes
    rows: list[list[str]] = []
    for part in todo:
        started = time.monotonic()
        limit = min(part.seconds, end - started)
        outcome = run(part, folder, limit) if limit > 0 else "not run: the time is up"
        seconds = f"{time.monotonic() - started:.0f}"
        row = [part.name, part.what, outcome, seconds, str(part.expected), result(part, folder)]
        rows.append(row)
        print(f"{part.name}: {outcome}, {seconds} s", flush=True)
        columns = ("part", "what", "outcome", "seconds", "expected", "result")
        text = f"{report.header('GPU check', command, device)}\n\n{report.table(columns, rows)}\n"
        (folder / "gpu_check.md").write_text(text, encoding="utf-8")
    return all(row[2] == "passed" for row in rows)


def run(part: Part, folder: Path, limit: float) -> str:
    """Run one part for at most `limit` seconds; the outcome in words."""
    command = [sys.executable, *part.arguments]
    if part.reports:
        table = folder / f"{part.name}.md"
        table.unlink(missing_ok=True)  # an earlier run's
        command += ["--output", str(table)]
    with open(folder / f"{part.name}.log", "w", encoding="utf-8") as log:
        print(f"$ {shlex.join(command)}", file=log, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        finally:
            _end(process)
    return "passed" if code == 0 else f"failed with exit code {code}"


def _end(process: subprocess.Popen) -> None:
    """End a part's process group: a test's own processes would hold the GPU's memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def result(part: Part, folder: Path) -> str:
    """A link to a part's tables, else what it said last, short enough for a cell."""
    if (folder / f"{part.name}.md").exists():
        return f"[{part.name}.md]({part.name}.md)"
    log = folder / f"{part.name}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    said = [line.strip() for line in lines[1:] if line.strip()]
    return said[-1][:120].replace("|", "/") if said else ""


def main(arguments: list[str] | None = None) -> int:
    parser = ToolParser(__doc__, prog="python -m benchmarks.gpu_check")
    parser.add_argument("--small", action="store_true", help="tiny sizes, also without a GPU")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu_check")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--parts", nargs="+", help="these alone, by name")
    given = sys.argv[1:] if arguments is None else arguments
    parsed = parser.parse_args(given)
    if not (parsed.small or torch.cuda.is_available()):
        print("error: no CUDA device; --small runs the parts on the CPU", file=sys.stderr)
        return EXIT_USER_ERROR
    todo = parts(parsed.small)
    unknown = set(parsed.parts or ()) - {part.name for part in todo}
    if unknown:
        known = ", ".join(part.name for part in todo)
        print(f"error: no parts {', '.join(unknown)}; choose of {known}", file=sys.stderr)
        return EXIT_USER_ERROR
    folder = parsed.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    todo = [part for part in todo if not parsed.parts or part.name in parsed.parts]
    passed = check(todo, folder, parsed.minutes, f"{parser.prog} {shlex.join(given)}")
    print(f"results: {folder / 'gpu_check.md'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
