"""What a checkpoint costs training, in turn and beside it: the wait, processor time, memory.

    python -m benchmarks.bench_save --output benchmarks/save_cpu.md

Ranks of one machine (one, two, two with the distributed optimizer) save the state of the demo's
model and of a wide one, all of it trained: weights, FP32 masters and Adam's moments. In every round
each rank

- writes what is its share with torch.distributed.checkpoint's own writer: no sums, no commit;
- saves while training waits (`checkpoint.asynchronous: false`), with everything that belongs to it:
  planning, sums, manifest, commit;
- saves beside training: the wait until it could go on, and the end of the save;
- hashes as many bytes, for the share of the sums in that.

Processor time is that of all threads of all ranks. Memory is the growth of the resident set of the
rank that grew most, from before a save to its peak. All copies but the first are made in the memory
of the first. Files are removed after every save.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as processes

from benchmarks import report
from benchmarks.demo_model import demo_model
from benchmarks.layer_memory import reset_resident_peak, resident_peak
from benchmarks.protocol import Spread
from megatron_dattn.runtime.log import setup_logging, silence_import_warnings

silence_import_warnings()  # before megatron-core is imported

from megatron_dattn.checkpoint.share import Share  # noqa: E402
from megatron_dattn.config.pretrain import PretrainConfig  # noqa: E402
from megatron_dattn.config.training import (  # noqa: E402
    CheckpointConfig,
    ModuleLearningRates,
    OptimizerConfig,
    TrainingConfig,
)
from megatron_dattn.models.config import ModelConfig  # noqa: E402
from megatron_dattn.models.execution import ExecutionConfig  # noqa: E402
from megatron_dattn.parallel.config import ParallelConfig  # noqa: E402
from megatron_dattn.runtime.distributed import destroy_distributed  # noqa: E402
from megatron_dattn.runtime.tool import ToolParser  # noqa: E402
from megatron_dattn.training.run import build_state, join_ranks, make_checkpointer  # noqa: E402
from megatron_dattn.training.stages import build_training_model  # noqa: E402
from megatron_dattn.training.state import TrainState, sharded_state  # noqa: E402

LAYOUTS = {
    "dp1": ("one rank", 1, False),
    "dp2": ("two ranks", 2, False),
    "dp2-distributed": ("two ranks, distributed optimizer", 2, True),
}
SIZES = ("demo", "wide")
RAW, IN_TURN, BESIDE, SUMS = "torch's writer", "in turn", "beside training", "sums alone"
VARIANTS = (RAW, IN_TURN, BESIDE, SUMS)
_HASHED_AT_A_TIME = 4 * 2**20


@dataclass(frozen=True)
class Cost:
    """Of one save on one rank."""

    wait: float
    """Seconds until training could go on."""
    wall: float
    """Seconds until the checkpoint is there."""
    cpu: float
    """Seconds of processor time."""
    memory: int
    """Bytes by which the resident set grew at its peak."""


def save_report(arguments: argparse.Namespace) -> str:
    """Measure everything; the whole Markdown file."""
    rows, notes = [], []
    for size in arguments.sizes:
        model = wide_model(arguments) if size == "wide" else demo_model("dattn")
        for layout, ranks, distributed in (LAYOUTS[name] for name in arguments.layouts):
            measured = _measure_layout(arguments, model, ranks, distributed)
            notes.append(f"{size}, {layout}: {measured['bytes'] / 1e6:.1f} MB written")
            rows += [
                [f"{size}, {layout}: {name}", *_figures(measured["rounds"], name)]
                for name in VARIANTS
            ]
    notes = [
        report.rounds_note(arguments.rounds, arguments.rounds, 1).replace(
            "one process", "one process per rank, gloo"
        ),
        f"{arguments.precision}, below {arguments.folder or tempfile.gettempdir()}",
        "copies for saves beside training take as many bytes as the rank writes, from the first "
        "save on; they are not in the growth",
        *notes,
    ]
    head = report.header("Saving", arguments.command, torch.device("cpu"), notes)
    columns = ["what", "wait, s", "until it is there, s", "CPU, s", "more memory, MB"]
    return f"{head}\n\n{report.table(columns, rows)}"


def wide_model(arguments: argparse.Namespace) -> ModelConfig:
    """The demo's model with a larger language model."""
    model = demo_model("dattn")
    language = replace(
        model.language,
        hidden_size=arguments.hidden_size,
        intermediate_size=4 * arguments.hidden_size,
        num_hidden_layers=arguments.layers,
    )
    return replace(model, language=language)


def _figures(rounds: list[dict[str, list[dict[str, Any]]]], name: str) -> list[str]:
    """Cells of one variant: the slowest rank's times, all ranks' CPU, the largest growth."""
    costs = [[Cost(**cost) for cost in by_variant[name]] for by_variant in rounds]
    seconds = [
        Spread.of([max(getattr(cost, field) for cost in ranks) for ranks in costs])
        for field in ("wait", "wall")
    ]
    cpu = Spread.of([sum(cost.cpu for cost in ranks) for ranks in costs])
    memory = max(cost.memory for ranks in costs for cost in ranks)
    return [*(report.spread(s, 3) for s in (*seconds, cpu)), f"{memory / 1e6:.1f}"]


def _measure_layout(
    arguments: argparse.Namespace, model: ModelConfig, ranks: int, distributed: bool
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="save-", dir=arguments.folder) as folder:
        with closing(socket.create_server(("127.0.0.1", 0))) as listener:
            port = listener.getsockname()[1]
        processes.spawn(
            _measure_rank,
            (arguments, model, distributed, ranks, folder, port),
            nprocs=ranks,
            start_method="spawn",
        )
        return json.loads((Path(folder) / "measured.json").read_text())


def _measure_rank(
    rank: int,
    arguments: argparse.Namespace,
    model: ModelConfig,
    distributed: bool,
    ranks: int,
    folder: str,
    port: int,
) -> None:
    """One rank; the first one writes the figures of all down."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    setup_logging(rank, level="ERROR", stream=sys.stderr)
    torch.set_num_threads(arguments.threads)
    config = PretrainConfig(
        model=model,
        optimizer=OptimizerConfig(learning_rates=ModuleLearningRates(1e-4, 1e-4, 1e-4)),
        training=TrainingConfig(micro_batch_size=1, global_batch_size=ranks),
        parallel=ParallelConfig(use_distributed_optimizer=distributed),
        execution=ExecutionConfig(precision=arguments.precision),
        checkpoint=CheckpointConfig(save=f"{folder}/run"),
    )
    join_ranks(config)
    state = build_state(config, build_training_model(config))
    work = variants(config, state, Path(folder))
    rounds = []
    for number in range(arguments.rounds + 1):
        order = VARIANTS if number % 2 else VARIANTS[::-1]
        rounds.append({name: _cost_of(work[name], state, Path(folder)) for name in order})
    if rank == 0:
        num_bytes = [0] * ranks
        dist.gather_object(_share(state).num_bytes, num_bytes)
        measured = {"bytes": sum(num_bytes), "rounds": rounds[1:]}
        (Path(folder) / "measured.json").write_text(json.dumps(measured))
    else:
        dist.gather_object(_share(state).num_bytes)
    destroy_distributed()


def variants(
    config: PretrainConfig, state: TrainState, folder: Path
) -> dict[str, Callable[[], float]]:
    """The work, by name; each returns when, by `time.perf_counter`, training could go on."""
    checkpointer = make_checkpointer(config, tokenizer="0" * 64)

    def write_raw() -> float:
        writer = dcp.FileSystemWriter(folder / f"raw-{state.progress.step}-{dist.get_rank()}")
        share = _share(state)
        (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(share.save_plan)])
        writer.write_data(plan, share).wait()
        return time.perf_counter()

    def save_in_turn() -> float:
        checkpointer.save(state)
        return time.perf_counter()

    def save_beside() -> float:
        checkpointer.save(state, beside=True)
        on = time.perf_counter()
        checkpointer.finish()
        return on

    def hash_alone() -> float:
        block = memoryview(bytearray(_HASHED_AT_A_TIME))
        digest = hashlib.sha256()
        left = _share(state).num_bytes
        while left > 0:
            digest.update(block[: min(left, len(block))])
            left -= len(block)
        return time.perf_counter()

    work = (write_raw, save_in_turn, save_beside, hash_alone)
    return dict(zip(VARIANTS, work, strict=True))


def _share(state: TrainState) -> Share:
    return Share(sharded_state(state, is_loading=False))


def _cost_of(work: Callable[[], float], state: TrainState, folder: Path) -> list[dict[str, Any]]:
    """What it costs each rank; the next save is of another step."""
    state.progress.step += 1
    dist.barrier()
    before = reset_resident_peak()
    cpu, began = time.process_time(), time.perf_counter()
    on = work()
    ended = time.perf_counter()
    cost = Cost(
        on - began, ended - began, time.process_time() - cpu, max(resident_peak() - before, 0)
    )
    costs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(costs, asdict(cost))
    if dist.get_rank() == 0:
        for entry in folder.iterdir():
            shutil.rmtree(entry)
    dist.barrier()
    return costs


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; `command` is what to type to repeat it."""
    parser = ToolParser(__doc__, prog="python -m benchmarks.bench_save")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--layouts", nargs="+", choices=tuple(LAYOUTS), default=tuple(LAYOUTS))
    parser.add_argument("--hidden-size", type=int, default=1024, help="of the wide model")
    parser.add_argument("--layers", type=int, default=4, help="of the wide model")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--folder", help="where to write; the system's temporary folder if left out"
    )
    parser.add_argument("--output", type=Path, help="Markdown file; printed in any case")
    parsed = parser.parse_args(arguments)
    parsed.command = f"{parser.prog} {shlex.join(arguments)}".strip()
    return parsed


def main(arguments: list[str] | None = None) -> int:
    return report.run(save_report, parse(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
