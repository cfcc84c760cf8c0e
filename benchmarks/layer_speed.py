"""Time of one decoder layer's step by variant and visual tokens, beside bound and correctness."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks import report
from benchmarks.agreement import Agreement, agree
from benchmarks.ceilings import describe, measure_machine
from benchmarks.decoder_layer import GB, Bench, LayerBench, Variant, fits, one_sample
from benchmarks.layer_memory import peak_of_step
from benchmarks.layer_profile import Profile, profile_layer, profile_table
from benchmarks.protocol import WARM_UP, Spread, Timer, Timings, time_on_host, time_rounds, timer_of
from benchmarks.roofline import Machine, Work, bound_seconds, layer_operators, total_work


@dataclass(frozen=True)
class Result:
    """One variant at one number of visual tokens."""

    visual: int
    variant: str
    time: Spread
    """Milliseconds."""
    ratio: Spread | None
    """To the first variant; None for the first."""
    work: Work
    bound_seconds: float
    peak_bytes: int | None
    """None on the host, where a long-lived process cannot tell."""
    agreement: Agreement | None
    """None beyond `Sizing.compared_up_to`."""
    profile: Profile | None
    """None but under `Sizing.cpu_time`."""


@dataclass(frozen=True)
class Sizing:
    """What is swept, and how long."""

    visual: list[int]
    text: int
    rounds: int
    seconds: float | None
    """No new round after so long, at each number of visual tokens."""
    compared_up_to: int | None = None
    """Visual tokens above which nothing is compared with float64; None compares all."""
    cpu_time: bool = False
    """Times are this process's CPU time, and operators are profiled."""

    def timer(self, bench: Bench) -> Timer:
        """Seconds of one step."""
        if self.cpu_time:
            return partial(time_on_host, clock=time.process_time)
        return timer_of(bench.device)


def speed_report(bench: Bench, variants: list[Variant], sizing: Sizing, command: str) -> str:
    """Measure all variants at all numbers of visual tokens; the whole Markdown file."""
    machine = measure_machine(bench.device, bench.dtype, sizing.timer(bench))
    results: list[Result] = []
    notes = [bench.describe(sizing.text), describe(machine, bench.dtype)]
    for visual in sizing.visual:
        fitting = [v for v in variants if fits(bench, v, visual + sizing.text, notes)]
        if not fitting:
            continue
        found, timings = measure(bench, fitting, visual, sizing, machine)
        results += found
        rounds = report.rounds_note(timings.num_rounds, sizing.rounds, WARM_UP)
        floor = f"{fitting[0].name} to itself {report.spread(timings.noise)}"
        notes.append(f"{visual} visual tokens: {rounds}; noise floor, ratio of {floor}")
    if sizing.cpu_time:
        notes.append("times are the process's CPU time, which other work leaves nearly alone")
    title = "One decoder layer, forward and backward"
    sections = [report.header(title, command, bench.device, notes), speed_table(results)]
    if sizing.cpu_time:
        sections += where_time_goes(results)
    sections += [
        "Relative errors before timing, the worse of text and visual tokens:",
        agreement_table(results),
    ]
    return "\n\n".join(sections)


def measure(
    bench: Bench, variants: list[Variant], visual: int, sizing: Sizing, machine: Machine
) -> tuple[list[Result], Timings]:
    """Check and time the variants side by side at one number of visual tokens."""
    layout = one_sample(visual, sizing.text)
    layers = {variant.name: LayerBench(bench, variant, layout) for variant in variants}
    compared = sizing.compared_up_to is None or visual <= sizing.compared_up_to
    agreements = agree(layers) if compared else {}
    timings = time_rounds(
        {name: layer.step for name, layer in layers.items()},
        rounds=sizing.rounds,
        timer=sizing.timer(bench),
        budget_seconds=sizing.seconds,
    )
    results = [
        _result(
            layer,
            timings,
            machine,
            agreements.get(name),
            profile_layer(layer) if sizing.cpu_time else None,
        )
        for name, layer in layers.items()
    ]
    return results, timings


def _result(
    layer: LayerBench,
    timings: Timings,
    machine: Machine,
    agreement: Agreement | None,
    profile: Profile | None,
) -> Result:
    name, base = layer.variant.name, next(iter(timings.seconds))
    operators = layer_operators(layer.bench.run_of(layer.variant, layer.layout))
    return Result(
        visual=layer.layout.num_visual_tokens,
        variant=name,
        time=timings.milliseconds(name),
        ratio=None if name == base else timings.ratio(name, base),
        work=total_work(operators),
        bound_seconds=bound_seconds(operators, machine),
        peak_bytes=peak_of_step(layer) if layer.bench.device.type == "cuda" else None,
        agreement=agreement,
        profile=profile,
    )


def speed_table(results: list[Result]) -> str:
    """Time beside its bound; the peak too where it is known."""
    columns = ["variant", "visual tokens", "median ms", "ratio to the first (min to max)"]
    columns += ["GFLOP", "GB moved", "bound ms", "bound / time"]
    rows = [_speed_row(result) for result in results]
    if all(result.peak_bytes is not None for result in results):
        columns.append("peak GB")
        for row, result in zip(rows, results, strict=True):
            row.append(f"{(result.peak_bytes or 0) / GB:.3g}")
    return report.table(columns, rows)


def _speed_row(result: Result) -> list[str]:
    bound = 1000 * result.bound_seconds
    return [
        result.variant,
        str(result.visual),
        f"{result.time.median:.2f}",
        "1" if result.ratio is None else report.spread(result.ratio),
        f"{result.work.flops / 1e9:.4g}",
        f"{result.work.bytes / GB:.3g}",
        f"{bound:.2f}",
        f"{bound / result.time.median:.2f}",
    ]


def where_time_goes(results: Sequence[Result]) -> list[str]:
    """The profile, and what it leaves of the ratios: paragraphs and tables."""
    profiles = {(r.variant, r.visual): r.profile for r in results if r.profile is not None}
    return [
        "## Where the time goes",
        "CPU ms of a step's operators, forward + backward:",
        profile_table(profiles),
        "Time over that of the first variant, as reached and as it would be if nothing but the "
        "bound's operations and bytes, or nothing but products and attention kernels as they "
        "are, took time:",
        ratio_table(results),
    ]


def ratio_table(results: Sequence[Result]) -> str:
    """Ratios to the first variant beside those of bounds and kernels."""
    columns = ["variant", "visual tokens", "reached", "of the bounds", "reached / bounds"]
    columns += ["of the kernels", "reached / kernels"]
    rows = []
    for result in results:
        first = next(r for r in results if r.visual == result.visual)
        if result is first or result.ratio is None:
            continue
        assert result.profile is not None
        assert first.profile is not None
        reached, bound = result.ratio.median, result.bound_seconds / first.bound_seconds
        kernels = result.profile.kernels / first.profile.kernels
        figures = (reached, bound, reached / bound, kernels, reached / kernels)
        rows.append([result.variant, str(result.visual), *(f"{x:.2f}" for x in figures)])
    return report.table(columns, rows)


def agreement_table(results: list[Result]) -> str:
    """Errors beside what they are measured against."""
    columns = (
        "variant",
        "visual tokens",
        "against",
        "output",
        "input gradient",
        "weight gradients",
    )
    rows = [_agreement_row(r, r.agreement) for r in results if r.agreement is not None]
    return report.table(columns, rows)


def _agreement_row(result: Result, found: Agreement) -> list[str]:
    errors = (found.output, found.input_gradient, found.weight_gradient)
    figures = (f"{error:.1e}" for error in errors)
    return [result.variant, str(result.visual), found.against, *figures]
