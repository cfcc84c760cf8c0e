"""What a micro-batch costs the host besides the model: its plans, positions and operations counted.

    python -m benchmarks.bench_host --output benchmarks/host_cpu.md

While the host plans, a GPU may wait. Every round takes a pack that nobody has seen before, as every
step does, and the presets one after the other, each on a pack as it lays one out. The time is the
process's own CPU time, which other work on the machine leaves nearly alone. Plans are those of all
layers that differ, with the boundaries of their segments and whether they share keys, as the
variable-length kernels need them; "operations" is `planner/flops.py` for the step's report.
"""

import argparse
import random
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.protocol import DEFAULT_ROUNDS, WARM_UP, Spread, time_on_host
from megatron_dattn.attention import PRESETS, AttentionConfig
from megatron_dattn.attention.layers import layer_rules
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.plan.parts import plan_attention
from megatron_dattn.attention.positions import token_positions
from megatron_dattn.attention.visual_config import kept_grid
from megatron_dattn.models.config import LanguageConfig, ModelConfig
from megatron_dattn.planner.flops import model_flops
from megatron_dattn.runtime.tool import ToolParser

COLUMNS = ("plans", "positions", "operations")


def host_report(arguments: argparse.Namespace) -> str:
    """Measure everything; the whole Markdown file."""
    language = LanguageConfig(
        num_hidden_layers=arguments.layers, sliding_window=arguments.window or None
    )
    seconds = measure(language, arguments)
    rows = []
    for preset, columns in seconds.items():
        sums = [sum(parts) for parts in zip(*columns.values(), strict=True)]
        figures = [Spread.of([1000 * value for value in values]) for values in columns.values()]
        total = Spread.of([1000 * value for value in sums])
        rows.append([preset, *(report.spread(figure) for figure in (*figures, total))])
    notes = [
        report.rounds_note(arguments.rounds, arguments.rounds, WARM_UP),
        f"{arguments.images} images of {arguments.grid[0] * arguments.grid[1]} patches, one per "
        f"sample, with 64 to 256 text tokens each; {arguments.layers} layers"
        + (f" with a window of {arguments.window} tokens" if arguments.window else ""),
        "CPU time of the process in ms per micro-batch",
    ]
    title = "The host's time per micro-batch"
    head = report.header(title, arguments.command, torch.device("cpu"), notes)
    return f"{head}\n\n{report.table(['preset', *COLUMNS, 'sum'], rows)}"


def measure(
    language: LanguageConfig, arguments: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Seconds per round, by preset and column."""
    seconds: dict[str, dict[str, list[float]]] = {
        preset: {column: [] for column in COLUMNS} for preset in PRESETS
    }
    for number in range(-WARM_UP, arguments.rounds):
        for preset in PRESETS if number % 2 == 0 else reversed(PRESETS):
            pack = make_pack(number, PRESETS[preset], arguments)
            for column, step in steps(preset, pack, language).items():
                spent = time_on_host(step, time.process_time)
                if number >= 0:
                    seconds[preset][column].append(spent)
    return seconds


def steps(
    preset: str, pack: TokenLayout, language: LanguageConfig
) -> dict[str, Callable[[], object]]:
    """The training step's work on the host, by column."""
    config = PRESETS[preset]
    model = replace(ModelConfig(), language=language, attention=preset)
    rules = layer_rules(config, language.num_hidden_layers, skip_unread=True)
    layers = dict.fromkeys((rule, language.window(layer)) for layer, rule in enumerate(rules))

    def plans() -> None:
        for rule, window in layers:
            plan = plan_attention(rule.layout(pack), rule.attention, window=window)
            _ = plan.parts_share_keys, plan.visual_parts_share_keys
            for part in (*plan.parts, *plan.visual_parts):
                _ = part.query_cu_seqlens, part.key_cu_seqlens

    return {
        "plans": plans,
        "positions": lambda: token_positions(pack, config),
        "operations": lambda: model_flops(model, [pack]),
    }


def make_pack(seed: int, config: AttentionConfig, arguments: argparse.Namespace) -> TokenLayout:
    """A sample for every image, with text of random length around it."""
    rng = random.Random(seed)
    grid = kept_grid(tuple(arguments.grid), config.visual)
    texts = tuple(rng.randint(64, 256) for _ in range(arguments.images))
    spans = tuple(
        ImageSpan(sample, rng.randint(0, length // 2), grid) for sample, length in enumerate(texts)
    )
    visual = sum(span.num_tokens for span in spans)
    prompts = tuple(length // 2 for length in texts)
    return TokenLayout(texts, spans, visual, 256 * arguments.images, prompts)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; `command` is what to type to repeat it."""
    parser = ToolParser(__doc__, prog="python -m benchmarks.bench_host")
    parser.add_argument("--images", type=int, default=8, help="of the micro-batch, one per sample")
    parser.add_argument("--grid", type=int, nargs=2, default=(27, 27), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--window", type=int, default=0, help="sliding window; 0 for none")
    parser.add_argument("--rounds", type=int, default=DEFAULT_ROUNDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="Markdown file; printed in any case")
    parsed = parser.parse_args(arguments)
    parsed.command = f"{parser.prog} {shlex.join(arguments)}"
    return parsed


def main(arguments: list[str] | None = None) -> int:
    return report.run(host_report, parse(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
