"""Context parallelism: bytes that a layer sends over numbers of visual tokens, and memory.

    python -m benchmarks.bench_context --output benchmarks/context_cpu.md
    python -m benchmarks.bench_context --memory --output benchmarks/context_memory_cpu.md

The bytes are those that cross the loopback device of a network that nobody else uses (`unshare
--net`), headers and acknowledgements included, of a forward and a backward pass over gloo. With
--memory the ranks train one step each of one sample, up to a million visual tokens; every figure is
that of new processes.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.layer_memory import ALLOCATOR, fit_line
from megatron_dattn.errors import UserError
from megatron_dattn.parallel.context.exchange import bytes_per_layer
from megatron_dattn.runtime.tool import ToolParser

TEXT, LAYERS, HEADS, KEY_HEADS, HEAD_DIM = 512, 4, 8, 4, 64
_VALUE_BYTES = 4
_ROOT = Path(__file__).resolve().parents[1]
_NETWORK = ("unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"')


def traffic_report(arguments: argparse.Namespace) -> str:
    """Measure all numbers of ranks and visual tokens; the whole Markdown file."""
    notes = [
        f"{LAYERS} layers, {TEXT} text tokens, {HEADS} query and {KEY_HEADS} key heads of "
        f"{HEAD_DIM}, fp32; forward and backward, per layer and rank",
        "measured: bytes on the loopback device, with headers; the others are computed: the text's "
        "partial results by `bytes_per_layer`; keys and values of all tokens in a ring (theirs and "
        "their gradients' come round again backward) and by all-gather (and reduce-scatter)",
    ]
    rows = []
    for ranks in arguments.ranks:
        order = {
            "ranks": ranks,
            "layers": LAYERS,
            "heads": HEADS,
            "key_heads": KEY_HEADS,
            "head_dim": HEAD_DIM,
            "text": TEXT,
            "visual": arguments.visual,
        }
        found = run_ranks("traffic", order, network=True)
        rows += [traffic_row(ranks, visual, found[str(visual)]) for visual in arguments.visual]
    columns = (
        *("ranks", "visual tokens", "measured kB", "formula kB", "measured / formula"),
        *("ring kB", "all-gather kB", "ring / measured"),
    )
    head = report.header(
        "What a layer sends under context parallelism", arguments.command, _cpu(), notes
    )
    return f"{head}\n\n{report.table(columns, rows)}"


def traffic_row(ranks: int, visual: int, all_bytes: int) -> list[str]:
    """The row of a measurement, from the bytes that all ranks sent in all layers."""
    measured = all_bytes / ranks / LAYERS
    formula = sum(bytes_per_layer(TEXT, HEADS, HEAD_DIM, ranks, value_bytes=_VALUE_BYTES))
    # Of keys and values of a rank's tokens, to each of the other ranks.
    once = (ranks - 1) * (visual + TEXT) // ranks * 2 * KEY_HEADS * HEAD_DIM * _VALUE_BYTES
    ring = once + 2 * once
    gathered = once + 2 * once
    sizes = (measured, formula)
    return [
        str(ranks),
        str(visual),
        *(f"{size / 1e3:.1f}" for size in sizes),
        f"{measured / formula:.4f}",
        *(f"{size / 1e3:.1f}" for size in (ring, gathered)),
        f"{ring / measured:.1f}",
    ]


def memory_report(arguments: argparse.Namespace) -> str:
    """Measure steps of growing samples; the whole Markdown file."""
    notes = [
        f"width 32, 2 layers, fp32, full recomputation, FFN in chunks; one sample, {TEXT} text "
        "tokens, images of 256 tokens; every module trains",
        "peak: the largest resident set of a rank (the most of all ranks, and the least) in a "
        "step, forward, backward and update, in new processes; MB are 10^6 bytes",
    ]
    rows, points = [], {}
    (ranks,) = arguments.ranks[-1:]
    for visual in arguments.visual:
        order = {"ranks": ranks, "visual": visual, "text": TEXT}
        found = run_ranks("memory", order)
        assert found["visual_tokens"] == visual
        points[visual] = max(found["peak"])
        rows.append(
            [
                str(visual),
                f"{max(found['before']) / 1e6:.0f}",
                f"{points[visual] / 1e6:.0f} ({min(found['peak']) / 1e6:.0f})",
                f"{found['loss']:.4f}",
            ]
        )
    columns = ("visual tokens", "MB before the step", "peak MB", "loss")
    title = f"A step of one sample on {ranks} context-parallel ranks"
    text = f"{report.header(title, arguments.command, _cpu(), notes)}\n\n"
    text += report.table(columns, rows)
    line = fit_line(points)
    if line is not None:
        text += (
            f"\n\nThe straight line: {line.constant / 1e6:.0f} MB and {line.per_token:.0f} bytes "
            f"per visual token of the sample; no figure is further from it than "
            f"{100 * line.deviation:.1f} %."
        )
    return text


def run_ranks(what: str, order: dict[str, Any], *, network: bool = False) -> dict[str, Any]:
    """Start ranks, and take what they find.

    Args:
        network: whether they get a network of their own.

    Raises:
        UserError: this machine gives none.
        RuntimeError: a rank failed, with the end of what it said.
    """
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    command = [*torchrun, f"--nproc-per-node={order['ranks']}", "-m", "benchmarks.context_ranks"]
    command.append(json.dumps({"what": what, **order}))
    if network:
        _require_network()
        command = [*_NETWORK, "sh", *command]
    environment = {**os.environ, **ALLOCATOR, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, env=environment, cwd=_ROOT, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise RuntimeError(f"{what} of {order} failed: {ended.stderr[-3000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def _require_network() -> None:
    tried = None
    if shutil.which("unshare"):
        tried = subprocess.run(
            [*_NETWORK, "sh", "true"], capture_output=True, text=True, check=False
        )
    if tried is None or tried.returncode:
        reason = "there is no unshare" if tried is None else tried.stderr.strip()
        raise UserError(
            f"this machine gives no network of its own to count on ({reason}); run it as root, or "
            "where user namespaces are allowed"
        )


def _cpu() -> torch.device:
    return torch.device("cpu")


def main(argv: list[str] | None = None) -> int:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--memory", action="store_true", help="memory of a step, not bytes")
    parser.add_argument("--ranks", type=int, nargs="+", help="2 4; with --memory 4")
    parser.add_argument("--visual", type=int, nargs="+", help="visual tokens, multiples of 256")
    parser.add_argument("--output", type=Path)
    parsed = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    parsed.command = f"python -m benchmarks.bench_context {shlex.join(words)}".strip()
    if parsed.memory:
        parsed.ranks = parsed.ranks or [4]
        parsed.visual = parsed.visual or [2**16, 2**18, 2**20]
    else:
        parsed.ranks = parsed.ranks or [2, 4]
        parsed.visual = parsed.visual or [1024, 4096, 16384]
    return report.run(memory_report if parsed.memory else traffic_report, parsed)


if __name__ == "__main__":
    sys.exit(main())
