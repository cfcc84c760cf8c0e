"""A run that is killed again and again, at random times, against one that nobody touched.

    python -m benchmarks.kill_and_resume --kills 100 --output benchmarks/kills_cpu.md

`pretrain_vlm.py` trains a small model on the demo's data with one loader process and a checkpoint
every few steps. SIGKILL strikes the trainer or its loader process after a random time: during the
start, in a step, in a save. Each time the same command is given again. At the end the killed run's
ledger must hold what the untouched one's holds, step by step and pack by pack; every sample of
every epoch once; and losses and stored weights must be equal, bit by bit.
"""

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import report
from megatron_dattn.runtime.log import silence_import_warnings

silence_import_warnings()  # before megatron-core is imported

import torch  # noqa: E402

from benchmarks.demo_model import demo_model  # noqa: E402
from examples.quickstart.make_data import DataOptions, make_data  # noqa: E402
from examples.quickstart.make_tokenizer import make_tokenizer  # noqa: E402
from megatron_dattn.checkpoint import find_checkpoint  # noqa: E402
from megatron_dattn.data.prepare import write_jsonl  # noqa: E402
from megatron_dattn.runtime.tool import ToolParser  # noqa: E402
from megatron_dattn.training.sample_ledger import read_ledger  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PREPROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 32, "width": 32},
    "resample": 3,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "rescale_factor": 1 / 255,
}
SECONDS_OF_A_START = 30.0  # at least; the first start is measured
PATIENCE = 600.0  # seconds without a step, or to end, until a run is thought to hang


@dataclass(frozen=True)
class Project:
    """Data, tokenizer and configuration of the runs."""

    folder: Path
    steps: int
    num_records: int
    more_flags: tuple[str, ...] = ()

    def flags(self, run: str) -> list[str]:
        """The command line of a run, without the script."""
        folder = self.folder / run
        return [
            *("--config", str(self.folder / "config.yaml"), "--checkpoint.save", str(folder)),
            *("--logging.sample_ledger", str(folder / "ledger")),
            *("--logging.tensorboard_dir", str(folder / "tensorboard")),
            *self.more_flags,
        ]


@dataclass
class Kills:
    """Counts of what was done to the run, and of what became of it."""

    by_target: Counter[str] = field(default_factory=Counter)
    steps_done_again: int = 0
    exit_codes: Counter[int] = field(default_factory=Counter)
    """Of trainers whose loader process was killed."""


def make_project(folder: Path, steps: int, num_images: int = 30) -> Project:
    """The demo's conversations about a few pictures, and a configuration."""
    data = folder / "data"
    make_data(DataOptions(data, train_images=num_images, validation_images=1, heldout_images=1))
    records = json.loads((data / "stage3.json").read_text())
    write_jsonl(records, data / "train.jsonl")
    tokenizer = make_tokenizer(folder / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    model = json.loads(json.dumps(asdict(demo_model("dattn"))))
    model["language"]["vocab_size"] = len(tokenizer)
    settings = {
        "model": model,
        "data": {
            "train": [{"path": str(data / "train.jsonl")}],
            "tokenizer": str(folder / "tokenizer"),
            "visual_budget": 96,
            "text_budget": 512,
            "packing_buffer_size": 16,
            "num_workers": 1,
        },
        "optimizer": {
            "learning_rates": {"vision_model": 1e-3, "adapter": 2e-3, "language_model": 1e-3}
        },
        "training": {
            "train_iters": steps,
            "micro_batch_size": 6,
            "global_batch_size": 12,
            "eval_interval": 0,
        },
        "execution": {"precision": "fp32"},
        "checkpoint": {"save_interval": 3},
        "logging": {"log_interval": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return Project(folder, steps, len(records))


def run_to_the_end(project: Project, run: str) -> float:
    """Seconds that it took.

    Raises:
        RuntimeError: it did not end well, or hangs.
    """
    started = time.monotonic()
    process = _start(project, run)
    code = _wait(project, run, process)
    if code:
        raise RuntimeError(f"the run ended with {code}:\n{_log(project, run).read_text()[-3000:]}")
    return time.monotonic() - started


def _wait(project: Project, run: str, process: "subprocess.Popen[bytes]") -> int:
    """The exit code, however long the run is, as long as it goes on."""
    step = _last_step(project, run)
    while True:
        try:
            return process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            before, step = step, _last_step(project, run)
            if step <= before:
                process.kill()
                log = _log(project, run).read_text()[-3000:]
                raise RuntimeError(f"the run hangs after step {step}:\n{log}") from None


def kill_at_random(
    project: Project, run: str, num_kills: int, seed: int, most_seconds: float = 2.0
) -> Kills:
    """Start the run and kill it, so many times; fewer if it comes to its end.

    Args:
        most_seconds: from the first step that a run does until it is killed.
    """
    kills, choice = Kills(), random.Random(seed)
    seconds_of_a_start = SECONDS_OF_A_START
    for _ in range(num_kills):
        before = _last_step(project, run)
        started = time.monotonic()
        process = _start(project, run)
        target = choice.choices(["start", "trainer", "loader process"], [1, 4, 3])[0]
        if target == "start":
            time.sleep(choice.uniform(0, seconds_of_a_start))
        else:
            while _last_step(project, run) <= before and process.poll() is None:
                time.sleep(0.05)  # each look reads the ledger
            seconds_of_a_start = time.monotonic() - started
            time.sleep(choice.uniform(0, most_seconds))
        if process.poll() is not None:
            break
        done = _last_step(project, run)
        _kill(process, target, choice, kills)
        found = find_checkpoint(project.folder / run, verify=False)
        kills.steps_done_again += max(0, done - (found.step if found else 0))
    return kills


def _kill(
    process: "subprocess.Popen[bytes]", target: str, choice: random.Random, kills: Kills
) -> None:
    workers = _loader_processes(process.pid)
    if target == "loader process" and workers:
        os.kill(choice.choice(workers), signal.SIGKILL)
        kills.exit_codes[process.wait(PATIENCE)] += 1
    else:
        target = "start" if target == "start" else "trainer"
        process.kill()
        process.wait(PATIENCE)
    kills.by_target[target] += 1


def _loader_processes(trainer: int) -> list[int]:
    """Children that are forks of the trainer: they have its command line."""
    try:
        children = Path(f"/proc/{trainer}/task/{trainer}/children").read_text().split()
        mine = Path(f"/proc/{trainer}/cmdline").read_bytes()
        return [int(c) for c in children if Path(f"/proc/{c}/cmdline").read_bytes() == mine]
    except OSError:
        return []


def _start(project: Project, run: str) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with _log(project, run).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "pretrain_vlm.py"), *project.flags(run)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _log(project: Project, run: str) -> Path:
    return project.folder / f"{run}.log"


def _ledger(project: Project, run: str) -> Path:
    return project.folder / run / "ledger" / "samples-dp00000.jsonl"


def _last_step(project: Project, run: str) -> int:
    """The last step of the ledger. A run that has just started still shows its former steps."""
    try:
        return max(read_ledger(_ledger(project, run)), default=0)
    except OSError:
        return 0


def differences(project: Project, killed: str, untouched: str) -> list[str]:
    """Describe what is wrong with the killed run; nothing if it equals the untouched one."""
    wrong = []
    ledgers = [read_ledger(_ledger(project, run)) for run in (killed, untouched)]
    if ledgers[0] != ledgers[1]:
        steps = [step for step in ledgers[1] if ledgers[0].get(step) != ledgers[1][step]]
        wrong.append(f"the ledgers differ in steps {steps[:10]}")
    shown = [key for packs in ledgers[0].values() for pack in packs for key in pack]
    for first in range(0, len(shown) - project.num_records + 1, project.num_records):
        counts = Counter(shown[first : first + project.num_records])
        if len(counts) != project.num_records:
            wrong.append(f"epoch {first // project.num_records} has {len(counts)} samples")
    losses = [scalars(project, run, "lm loss") for run in (killed, untouched)]
    if losses[0] != losses[1] or [step for step, _ in losses[0]] != [*range(1, project.steps + 1)]:
        wrong.append("the losses differ")
    weights = [_weights(project, run) for run in (killed, untouched)]
    if weights[0] != weights[1]:
        wrong.append("the stored weights and moments differ")
    return wrong


def scalars(project: Project, run: str, tag: str) -> list[tuple[int, float]]:
    """Steps and values of a curve of a run."""
    events = EventAccumulator(
        str(project.folder / run / "tensorboard"), size_guidance={"scalars": 0}
    )
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(tag)]


def _weights(project: Project, run: str) -> dict[str, str]:
    found = find_checkpoint(project.folder / run)
    assert found is not None
    assert found.step == project.steps
    files = found.manifest.files.items()
    return {name: file.sha256 for name, file in files if name.endswith((".distcp", ".bin"))}


def kills_report(arguments: argparse.Namespace) -> str:
    """Do everything; the whole Markdown file.

    Raises:
        RuntimeError: the killed run is not equal to the untouched one.
    """
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        project = make_project(Path(folder), arguments.steps or 10 * arguments.kills + 20)
        seconds = run_to_the_end(project, "untouched")
        kills = kill_at_random(project, "killed", arguments.kills, arguments.seed)
        run_to_the_end(project, "killed")
        wrong = differences(project, "killed", "untouched")
        if wrong:
            raise RuntimeError("; ".join(wrong))
        ledger = read_ledger(_ledger(project, "killed"))
    num_shown = sum(len(pack) for packs in ledger.values() for pack in packs)
    rows = [
        ["kills", str(kills.by_target.total())],
        *[[f"- {target}", str(number)] for target, number in sorted(kills.by_target.items())],
        ["exit codes where a loader process was killed", _counts(kills.exit_codes)],
        ["steps of the run", str(project.steps)],
        ["steps that were done again", str(kills.steps_done_again)],
        ["samples shown", str(num_shown)],
        ["whole epochs, each sample once", str(num_shown // project.num_records)],
        ["samples lost or repeated", "0"],
        ["steps whose packs, or whose loss, differ from the untouched run's", "0"],
        ["stored weights, moments and loader places that differ", "0"],
        ["seconds of the untouched run", f"{seconds:.0f}"],
    ]
    head = report.header("Kills at random times", arguments.command, torch.device("cpu"))
    return f"{head}\n{report.table(['what', 'number'], rows)}"


def _counts(counter: Counter[Any]) -> str:
    return ", ".join(f"{value}: {number} times" for value, number in sorted(counter.items()))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; `command` is what to type to repeat it."""
    parser = ToolParser(__doc__, prog="python -m benchmarks.kill_and_resume")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=0, help="of the run; 0: enough for the kills")
    parser.add_argument("--seed", type=int, default=0, help="of the times and targets")
    parser.add_argument("--output", type=Path, help="Markdown file; printed in any case")
    parsed = parser.parse_args(arguments)
    parsed.command = f"{parser.prog} {shlex.join(arguments)}"
    return parsed


def main(arguments: list[str] | None = None) -> int:
    return report.run(kills_report, parse(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
