"""Time and peak memory of a training step as wide as Mistral-7B, a few layers deep.

    python -m benchmarks.bench_wide_step --attention dattn --layers 8

One process, one preset: two such models do not fit one device. Everything trains, in BF16, on one
pack of random samples. Beside the time stand MFU, by the model FLOPs of `planner/flops.py`, and the
bound of `step_roofline.py`; beside the peak what `planner/memory.py` expects.
"""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.protocol import DEFAULT_ROUNDS, WARM_UP, Spread, time_rounds, timer_of
from megatron_dattn.runtime.log import silence_import_warnings

silence_import_warnings()  # before megatron-core is imported

from benchmarks.ceilings import describe, measure_machine  # noqa: E402
from benchmarks.demo_model import demo_model, make_batch  # noqa: E402
from benchmarks.roofline import bound_seconds  # noqa: E402
from benchmarks.step_roofline import StepRun, step_operators  # noqa: E402
from benchmarks.step_variants import EngineVariant, pretrain_config  # noqa: E402
from megatron_dattn.batch import IGNORED_LABEL, PackedBatch  # noqa: E402
from megatron_dattn.config.pretrain import PretrainConfig  # noqa: E402
from megatron_dattn.models.config import LanguageConfig, ModelConfig  # noqa: E402
from megatron_dattn.models.execution import ExecutionConfig  # noqa: E402
from megatron_dattn.planner.hardware import device_peak  # noqa: E402
from megatron_dattn.planner.memory import PackSize, rank_memory  # noqa: E402
from megatron_dattn.planner.parameters import count_parameters  # noqa: E402
from megatron_dattn.runtime.tool import ToolParser  # noqa: E402
from megatron_dattn.training.run import join_ranks  # noqa: E402

GB = 1e9
TEXT_LENGTHS = (200, 257)  # of a sample, as the longer answers of LLaVA's data


def wide_model(attention: str, layers: int) -> ModelConfig:
    """Mistral-7B and SigLIP so400m, so many decoder layers deep."""
    language = dataclasses.replace(LanguageConfig(), num_hidden_layers=layers)
    return ModelConfig(language=language, attention=attention)


def step_report(arguments: argparse.Namespace) -> str:
    """Measure the step; the whole Markdown file."""
    device = report.choose_device("auto")
    if arguments.model == "demo":
        model = demo_model(arguments.attention)
        batch = make_batch(model, arguments.samples)
    else:
        model = wide_model(arguments.attention, arguments.layers)
        batch = make_batch(model, arguments.samples, TEXT_LENGTHS)
    config = pretrain_config(model, batch, ExecutionConfig(recompute=arguments.recompute))
    join_ranks(config)
    timer = timer_of(device)
    machine = measure_machine(device, torch.bfloat16, timer)
    torch.cuda.empty_cache()  # the ceilings' tensors are not the step's
    engine = EngineVariant(config, batch)
    timings = time_rounds(
        {"step": engine.step},
        rounds=arguments.rounds,
        timer=timer,
        budget_seconds=arguments.seconds,
    )
    done, peak = engine.step(), peak_gb(engine)
    layout = batch.layout
    notes = [
        f"bf16, recompute {arguments.recompute}; forward, backward, clipping, AdamW on one pack of "
        f"{layout.num_samples} samples: {layout.num_visual_tokens} visual and {done.text_tokens} "
        f"text tokens; {sum(count_parameters(model).values()) / 1e9:.2f} G parameters",
        describe(machine, torch.bfloat16),
        report.rounds_note(timings.num_rounds, arguments.rounds, WARM_UP),
        f"noise floor, ratio of a step to itself: {report.spread(timings.noise)}",
        f"loss of the last step: {done.loss:.4f}, gradient norm {done.grad_norm:.3g}",
    ]
    bound = bound_seconds(step_operators(_run_of(config, batch)), machine)
    head = report.header("One wide training step", arguments.command, device, notes)
    row = _row(config, batch, timings.milliseconds("step"), done.flops, 1000 * bound, peak)
    return f"{head}\n\n{report.table(list(row), [list(row.values())])}"


def _row(
    config: PretrainConfig,
    batch: PackedBatch,
    time: Spread,
    flops: float,
    bound: float,
    peak: float | None,
) -> dict[str, str]:
    """Column and figure; times in milliseconds."""
    seconds, ceiling = time.median / 1000, device_peak("bf16")
    return {
        "preset": config.model.attention,
        "median ms (min to max)": report.spread(time, digits=1),
        "model TFLOP/step": f"{flops / 1e12:.3g}",
        "model TFLOP/s": f"{flops / 1e12 / seconds:.3g}",
        "MFU": f"{flops / seconds / ceiling:.3f}" if ceiling else "-",
        "bound ms": f"{bound:.1f}",
        "bound / time": f"{bound / time.median:.2f}",
        "peak GB": f"{peak:.1f}" if peak is not None else "-",
        "planned GB": f"{planned_gb(config, batch):.1f}",
    }


def peak_gb(engine: EngineVariant) -> float | None:
    """The most that one more step allocates; None on the host."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    engine.step()
    return torch.cuda.max_memory_allocated() / GB


def planned_gb(config: PretrainConfig, batch: PackedBatch) -> float:
    """The dry run's figure."""
    layout = batch.layout
    pack = PackSize(layout.visual_budget, layout.text_budget, len(layout.images))
    memory = rank_memory(
        config.model,
        config.parallel,
        config.execution,
        pack,
        data_parallel_size=1,
        num_microbatches=1,
        trained=frozenset(count_parameters(config.model)),
    )
    return memory.total / GB


def _run_of(config: PretrainConfig, batch: PackedBatch) -> StepRun:
    labelled = int((batch.labels != IGNORED_LABEL).sum())
    return StepRun(config.model, batch.layout, labelled, 2, config.execution.recompute)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; `command` is what to type to repeat it."""
    parser = ToolParser(__doc__, prog="python -m benchmarks.bench_wide_step")
    parser.add_argument("--attention", default="dattn", help="preset")
    parser.add_argument("--model", choices=("mistral_7b", "demo"), default="mistral_7b")
    parser.add_argument("--layers", type=int, default=8, help="of mistral_7b")
    parser.add_argument("--samples", type=int, default=8, help="samples per step")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--rounds", type=int, default=DEFAULT_ROUNDS)
    parser.add_argument("--seconds", type=float, help="begin no new round after so long")
    parser.add_argument("--output", type=Path, help="Markdown file; printed in any case")
    parsed = parser.parse_args(arguments)
    parsed.command = f"{parser.prog} {shlex.join(arguments)}"
    return parsed


def main(arguments: list[str] | None = None) -> int:
    return report.run(step_report, parse(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
