"""Time whole training steps of the demo's model: presets side by side, and plain PyTorch.

    python -m benchmarks.bench_step --attention dattn s_attn --output benchmarks/step_cpu.md

One process, the same samples and weights. In fp32 the step of a hand-written model and loop stands
beside the engine's `dattn`. Before anything is timed, the first losses of every variant are
compared with those of its preset in fp32, over the backend `math`, with nothing left out. Model
FLOPs are what the mathematics needs (`planner/flops.py`); padding and recomputation are not
counted. The bound is that of the engine's own operations and bytes (`step_roofline.py`).
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from benchmarks import report
from benchmarks.protocol import DEFAULT_ROUNDS, WARM_UP, Step, Timings, time_rounds, timer_of
from megatron_dattn.runtime.log import silence_import_warnings

silence_import_warnings()  # before megatron-core is imported

from benchmarks.ceilings import describe, measure_machine  # noqa: E402
from benchmarks.decoder_layer import DTYPES  # noqa: E402
from benchmarks.demo_model import demo_model, make_batch  # noqa: E402
from benchmarks.roofline import Machine, Operator, bound_seconds, total_work  # noqa: E402
from benchmarks.step_roofline import StepRun, step_operators  # noqa: E402
from benchmarks.step_variants import (  # noqa: E402
    EngineVariant,
    PlainVariant,
    distance,
    pretrain_config,
    reference_of,
)
from megatron_dattn.batch import IGNORED_LABEL, PackedBatch  # noqa: E402
from megatron_dattn.models.execution import ExecutionConfig  # noqa: E402
from megatron_dattn.runtime.tool import ToolParser  # noqa: E402
from megatron_dattn.training.metrics import StepReport  # noqa: E402
from megatron_dattn.training.run import join_ranks  # noqa: E402

PLAIN = "plain PyTorch"


def step_report(arguments: argparse.Namespace) -> str:
    """Measure all variants; the whole Markdown file."""
    device = report.choose_device(arguments.device)
    with_plain = arguments.precision == "fp32" and "dattn" in arguments.attention
    implementation: Literal["local", "auto"] = "local" if with_plain else "auto"
    execution = ExecutionConfig(
        arguments.precision, arguments.recompute, transformer_impl=implementation
    )
    # Presets may keep a part of the patches: the samples are the same, the packs are not.
    batches = {
        name: make_batch(demo_model(name), arguments.samples) for name in arguments.attention
    }
    configs = {
        name: pretrain_config(demo_model(name), batches[name], execution) for name in batches
    }
    join_ranks(configs[arguments.attention[0]])
    engines = {name: EngineVariant(config, batches[name]) for name, config in configs.items()}
    plain = PlainVariant(engines["dattn"], batches["dattn"]) if with_plain else None
    timer, dtype = timer_of(device), DTYPES[arguments.precision]
    machine = measure_machine(device, dtype, timer)
    notes = [
        f"{arguments.precision}, recompute {arguments.recompute}, transformer_impl "
        f"{implementation}; forward, backward, clipping, AdamW on {arguments.samples} samples",
        describe(machine, dtype),
        *correctness(engines, batches, plain, arguments.precision),
    ]
    steps: dict[str, Step] = {engine_name(name): engines[name].step for name in engines}
    if plain is not None:
        steps[PLAIN] = plain.step
    timings = time_rounds(
        steps, rounds=arguments.rounds, timer=timer, budget_seconds=arguments.seconds
    )
    notes += [
        report.rounds_note(timings.num_rounds, arguments.rounds, WARM_UP),
        f"noise floor, ratio of the first to itself: {report.spread(timings.noise)}",
    ]
    done = {engine_name(name): engine.step() for name, engine in engines.items()}
    if plain is not None:
        done[PLAIN] = done[engine_name("dattn")]
    head = report.header("One training step of the demo's model", arguments.command, device, notes)
    bounds = {
        engine_name(name): step_operators(step_run(engines[name], batches[name], arguments))
        for name in engines
    }
    tables = step_table(timings, done), bound_table(timings, bounds, machine)
    return "\n\n".join((head, *tables))


def engine_name(preset: str) -> str:
    """The engine's name in the tables, under a preset."""
    return f"engine {preset}"


def correctness(
    engines: dict[str, EngineVariant],
    batches: dict[str, PackedBatch],
    plain: PlainVariant | None,
    precision: str,
) -> Iterator[str]:
    """A line for every variant: its first losses against the reference's (and plain PyTorch's)."""
    for name, engine in engines.items():
        reference = reference_of(engine, batches[name]).first_losses()
        losses = engine.first_losses()
        far = distance(losses, reference, precision, f"{name} and its reference")
        figures = ", ".join(f"{loss:.6f}" for loss in losses)
        yield (
            f"first losses of {engine_name(name)}: {figures}; from fp32 with backend math and "
            f"nothing left out at most {far:.1e} of them"
        )
        if name == "dattn" and plain is not None:
            far = distance(losses, plain.first_losses(), precision, f"{name} and {PLAIN}")
            yield f"first losses of {PLAIN}: from engine dattn's at most {far:.1e} of them"


def step_run(engine: EngineVariant, batch: PackedBatch, arguments: argparse.Namespace) -> StepRun:
    """A variant as the roofline counts it."""
    return StepRun(
        engine.run.config.model,
        batch.layout,
        labelled_tokens=int((batch.labels != IGNORED_LABEL).sum()),
        value_bytes=DTYPES[arguments.precision].itemsize,
        recompute=arguments.recompute,
    )


def step_table(timings: Timings, work: dict[str, StepReport]) -> str:
    """Time, ratio to the first variant, and what a second brings; `work` is that of one step."""
    columns = ["variant", "visual tokens", "text tokens", "median ms (min to max)"]
    columns += ["ratio to the first (min to max)"]
    columns += ["text tokens/s", "all tokens/s", "model GFLOP/step", "model TFLOP/s"]
    base = next(iter(timings.seconds))
    rows = []
    for name in timings.seconds:
        time, done = timings.milliseconds(name), work[name]
        seconds, tokens = time.median / 1000, done.text_tokens + done.visual_tokens
        row = [
            name,
            str(done.visual_tokens),
            str(done.text_tokens),
            report.spread(time, digits=1),
            "1" if name == base else report.spread(timings.ratio(name, base)),
            f"{done.text_tokens / seconds:.0f}",
            f"{tokens / seconds:.0f}",
            f"{done.flops / 1e9:.2f}",
            f"{done.flops / 1e12 / seconds:.3g}",
        ]
        rows.append(row)
    return report.table(columns, rows)


def bound_table(timings: Timings, bounds: dict[str, tuple[Operator, ...]], machine: Machine) -> str:
    """The engine's own operations and bytes, and how near it comes to what they allow."""
    columns = ["variant", "GFLOP", "GB moved", "bound ms", "bound / time"]
    rows = []
    for name, operators in bounds.items():
        work, bound = total_work(operators), 1000 * bound_seconds(operators, machine)
        share = bound / timings.milliseconds(name).median
        figures = (f"{work.flops / 1e9:.2f}", f"{work.bytes / 1e9:.3g}", f"{bound:.1f}")
        rows.append([name, *figures, f"{share:.2f}"])
    return report.table(columns, rows)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; `command` is what to type to repeat it."""
    parser = ToolParser(__doc__, prog="python -m benchmarks.bench_step")
    parser.add_argument("--attention", nargs="+", default=["dattn", "s_attn"], help="presets")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--samples", type=int, default=64, help="samples per step")
    parser.add_argument("--rounds", type=int, default=DEFAULT_ROUNDS)
    parser.add_argument("--seconds", type=float, help="begin no new round after so long")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="Markdown file; printed in any case")
    parsed = parser.parse_args(arguments)
    parsed.command = f"{parser.prog} {shlex.join(arguments)}"
    return parsed


def main(arguments: list[str] | None = None) -> int:
    return report.run(step_report, parse(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
