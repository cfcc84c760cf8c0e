"""Peak memory of one decoder layer's step, and whether it grows in a straight line.

On a GPU the allocator knows its peak. On the host it is the largest resident set since the layer's
input stood ready, and what one run leaves behind (arenas, caches of kernels) would hide what the
next one needs: so every measurement is a process of its own, with an allocator that gives memory
back at once. A layer of a few tokens runs first, for what is needed once.
"""

import contextlib
import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.decoder_layer import Bench, LayerBench, Variant, fits, one_sample
from megatron_dattn.errors import UserError
from megatron_dattn.planner.layer_sizes import LayerSizes
from megatron_dattn.runtime.distributed import destroy_distributed, initialize_distributed

NOTES = (
    "peak of one step above what stands ready before it: weights, input, gradient of the output; "
    "the gradients of the weights are part of the constant",
    "on a CPU: the resident set's peak, one new process per figure, glibc with "
    "MALLOC_ARENA_MAX=1, MALLOC_MMAP_THRESHOLD_=65536, MALLOC_TRIM_THRESHOLD_=0",
)
# One arena, large blocks mapped and unmapped one by one, the heap's end returned when free.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
}
_FEW_TOKENS = 16
_ROOT = Path(__file__).resolve().parents[1]
_KIB = 1024


def peak_of_step(layer: LayerBench) -> int:
    """Bytes above what stands ready before a step, at the step's highest point."""
    layer.drop_gradients()
    if layer.bench.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        layer.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = reset_resident_peak()
    layer.step()
    return resident_peak() - before


def peak_in_new_process(bench: Bench, variant: str, visual: int, text: int) -> int:
    """Measure one variant at one size, in bytes.

    Raises:
        UserError: the kernel killed the process, which it does where memory runs out.
        RuntimeError: the process failed, with the end of what it said.
    """
    order = {
        "sizes": dataclasses.asdict(bench.sizes),
        "precision": bench.precision,
        "backend": bench.backend,
        "device": bench.device.type,
        "variant": variant,
        "visual": visual,
        "text": text,
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", "benchmarks.layer_memory", json.dumps(order)]
    environment = {**os.environ, **ALLOCATOR}
    ended = subprocess.run(
        command, env=environment, cwd=_ROOT, capture_output=True, text=True, check=False
    )
    if ended.returncode == -signal.SIGKILL:
        raise UserError(
            f"the process of {variant} at {visual} tokens was killed, most likely for want of "
            "memory; leave it out, or measure fewer tokens"
        )
    if ended.returncode:
        raise RuntimeError(
            f"{variant} at {visual} tokens ended with {ended.returncode}: {ended.stderr[-2000:]}"
        )
    return int(ended.stdout.split()[-1])


def _measure(order: dict) -> int:
    """What the new process does."""
    torch.set_num_threads(order["threads"])
    device = torch.device(order["device"])
    bench = Bench(LayerSizes(**order["sizes"]), device, order["precision"], order["backend"])
    variant = Variant.parse(order["variant"])
    initialize_distributed()
    try:
        LayerBench(bench, variant, one_sample(_FEW_TOKENS, order["text"])).step()
        return peak_of_step(LayerBench(bench, variant, one_sample(order["visual"], order["text"])))
    finally:
        destroy_distributed()


@dataclass(frozen=True)
class Line:
    """The least-squares line through (tokens, bytes)."""

    per_token: float
    constant: float
    deviation: float
    """The largest distance of a point from the line, as a share of the point."""


def fit_line(points: dict[int, int]) -> Line | None:
    """The line through bytes over tokens; None for fewer than three points, which prove nothing."""
    if len(points) < 3:
        return None
    tokens, sizes = list(points), list(points.values())
    mean_tokens, mean_size = sum(tokens) / len(tokens), sum(sizes) / len(sizes)
    covariance = sum((r - mean_tokens) * (s - mean_size) for r, s in points.items())
    slope = covariance / sum((r - mean_tokens) ** 2 for r in tokens)
    constant = mean_size - slope * mean_tokens
    deviation = max(abs(constant + slope * r - s) / s for r, s in points.items())
    return Line(slope, constant, deviation)


def memory_report(
    bench: Bench, variants: list[Variant], visual: list[int], text: int, command: str
) -> str:
    """Measure all variants at all numbers of visual tokens; the whole Markdown file."""
    left_out: list[str] = []
    peaks = {
        variant.name: {
            tokens: peak_in_new_process(bench, variant.name, tokens, text)
            for tokens in visual
            if fits(bench, variant, tokens + text, left_out)
        }
        for variant in variants
    }
    title = "Peak memory of one decoder layer, forward and backward"
    notes = [bench.describe(text), *NOTES, *left_out]
    return f"{report.header(title, command, bench.device, notes)}\n\n{peak_table(peaks, visual)}"


def peak_table(peaks: dict[str, dict[int, int]], visual: list[int]) -> str:
    """Peaks in MB by variant and visual tokens, bytes per token, distance from the line."""
    columns = ("peak MB at visual tokens", *map(str, visual), "kB per token", "largest deviation")
    rows = []
    for name, points in peaks.items():
        line = fit_line(points)
        fitted = ("", "") if line is None else _fitted(line)
        figures = (f"{points[v] / 1e6:.0f}" if v in points else "" for v in visual)
        rows.append([name, *figures, *fitted])
    return report.table(columns, rows)


def _fitted(line: Line) -> tuple[str, str]:
    return f"{line.per_token / 1e3:.2f}", f"{100 * line.deviation:.1f} %"


def reset_resident_peak() -> int:
    """Start a new peak, where Linux allows it; the resident set (or peak) from which to count."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return resident_peak()


def resident_peak() -> int:
    """Bytes. The kernel's own count: getrusage would include the parent's peak."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) * _KIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB


if __name__ == "__main__":
    print(_measure(json.loads(sys.argv[1])))
