"""Time whole training steps of the demo's model: presets side by side, and plain PyTorch.

    python -m benchmarks.bench_step --attention dattn s_attn --output benchmarks/step_cpu.md

One process, the same batch and weights. In fp32 the step of a hand-written model and loop stands
beside the engine's `dattn`, and their losses are compared before anything is timed. Model FLOPs are
what the mathematics needs (`models/flops.py`); padding and recomputation are not counted.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.protocol import DEFAULT_ROUNDS, WARM_UP, Step, Timings, time_rounds, timer_of
from megatron_dattn.errors import EXIT_USER_ERROR, UserError
from megatron_dattn.runtime.log import setup_logging, silence_import_warnings

silence_import_warnings()  # before megatron-core is imported

from benchmarks.demo_model import demo_model, make_batch  # noqa: E402
from benchmarks.step_variants import (  # noqa: E402
    EngineSettings,
    EngineVariant,
    PlainVariant,
    compare_losses,
    pretrain_config,
)
from megatron_dattn.runtime.distributed import destroy_distributed  # noqa: E402
from megatron_dattn.training.metrics import StepReport  # noqa: E402
from megatron_dattn.training.setup import start  # noqa: E402

PLAIN = "plain PyTorch"


def step_report(arguments: argparse.Namespace) -> str:
    """Measure all variants; the whole Markdown file."""
    device = report.choose_device(arguments.device)
    with_plain = arguments.precision == "fp32" and "dattn" in arguments.attention
    implementation = "local" if with_plain else "auto"
    settings = EngineSettings(arguments.precision, arguments.recompute, implementation)
    # Presets may keep a part of the patches: the samples are the same, the packs are not.
    batches = {
        name: make_batch(demo_model(name), arguments.samples) for name in arguments.attention
    }
    configs = {name: pretrain_config(name, batches[name], settings) for name in batches}
    start(configs[arguments.attention[0]])
    engines = {name: EngineVariant(config, batches[name]) for name, config in configs.items()}
    notes = [
        f"{arguments.precision}, recompute {arguments.recompute}, transformer_impl "
        f"{implementation}; forward, backward, clipping, AdamW on {arguments.samples} samples"
    ]
    steps: dict[str, Step] = {f"engine {name}": engine.step for name, engine in engines.items()}
    if with_plain:
        plain = PlainVariant(engines["dattn"], batches["dattn"])
        losses = ", ".join(f"{loss:.6f}" for loss in compare_losses(engines["dattn"], plain))
        notes.append(f"losses of the first steps agree between engine dattn and {PLAIN}: {losses}")
        steps[PLAIN] = plain.step
    timings = time_rounds(
        steps, rounds=arguments.rounds, timer=timer_of(device), budget_seconds=arguments.seconds
    )
    notes += [
        report.rounds_note(timings.num_rounds, arguments.rounds, WARM_UP),
        f"noise floor, ratio of the first to itself: {report.spread(timings.noise)}",
    ]
    work = {f"engine {name}": engine.step() for name, engine in engines.items()}
    if with_plain:
        work[PLAIN] = work["engine dattn"]
    head = report.header("One training step of the demo's model", arguments.command, device, notes)
    return f"{head}\n\n{step_table(timings, work)}"


def step_table(timings: Timings, work: dict[str, StepReport]) -> str:
    """Time, ratio to the first variant, and what a second brings; `work` is that of one step."""
    columns = ["variant", "visual rows", "text rows", "median ms (min to max)"]
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


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; `command` is what to type to repeat it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    parsed = parse(sys.argv[1:] if arguments is None else arguments)
    setup_logging(stream=sys.stderr, level="WARNING")
    try:
        report.set_threads(parsed.threads)
        report.write(step_report(parsed), parsed.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    finally:
        destroy_distributed()
    return 0


if __name__ == "__main__":
    sys.exit(main())
