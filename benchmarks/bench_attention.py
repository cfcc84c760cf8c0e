"""Time and memory of one decoder layer over numbers of visual tokens, preset against preset.

    python -m benchmarks.bench_attention --visual 576 2304 4608 9216 \
        --variants dattn dattn:naive s_attn s_attn:eager --output attention.md
    python -m benchmarks.bench_attention --cpu-time --threads 1 --variants dattn s_attn
    python -m benchmarks.bench_attention --memory --visual 4096 8192 16384 32768 65536

A variant is a preset with options: `dattn:naive` runs without exact savings, `s_attn:eager` is the
paper's setting, whose scores stand in memory, `dattn:recompute:chunk=4096` recomputes the layer and
runs its FFN in chunks, `dattn:backend=math` names a backend. The first variant is the one that the
others are compared with. Before anything is timed, outputs and gradients are compared with a
float64 run of the preset's definition, which takes minutes at ten thousand tokens on a CPU;
--compared-up-to leaves it out above a number of visual tokens.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.protocol import DEFAULT_ROUNDS
from megatron_dattn.errors import ConfigError
from megatron_dattn.planner.layer_sizes import LayerSizes
from megatron_dattn.runtime.log import silence_import_warnings

silence_import_warnings()  # before megatron-core is imported

from benchmarks.decoder_layer import Bench, Variant  # noqa: E402
from benchmarks.layer_memory import memory_report  # noqa: E402
from benchmarks.layer_speed import Sizing, speed_report  # noqa: E402
from megatron_dattn.runtime.distributed import (  # noqa: E402
    initialize_distributed,
)
from megatron_dattn.runtime.tool import ToolParser  # noqa: E402


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; `command` is what to type to repeat it."""
    parser = ToolParser(__doc__, prog="python -m benchmarks.bench_attention")
    parser.add_argument("--visual", type=int, nargs="+", default=[576, 2304, 4608, 9216])
    parser.add_argument("--text", type=int, default=256)
    variants = ["dattn", "dattn:naive", "s_attn", "s_attn:eager"]
    parser.add_argument("--variants", nargs="+", default=variants)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--backend", default="auto", help="of variants that name none")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--ffn", type=int, default=3584)
    parser.add_argument(
        "--vision-size", type=int, default=1024, help="width of the encoder's features (saisa)"
    )
    parser.add_argument("--rounds", type=int, default=DEFAULT_ROUNDS)
    parser.add_argument("--seconds", type=float, help="no new round after so long, per --visual")
    parser.add_argument(
        "--compared-up-to", type=int, help="no comparison with float64 above so many visual tokens"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="the process's CPU time, and where it goes, by a profile; on the host, of one thread",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="Markdown file; printed in any case")
    parsed = parser.parse_args(arguments)
    parsed.command = f"{parser.prog} {shlex.join(arguments)}"
    return parsed


def bench_of(arguments: argparse.Namespace) -> Bench:
    """Sizes, device and precision of the command line."""
    sizes = LayerSizes(
        hidden_size=arguments.hidden_size,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
        intermediate_size=arguments.ffn,
        vision_hidden_size=arguments.vision_size,
    )
    device = report.choose_device(arguments.device)
    return Bench(sizes, device, arguments.dtype, arguments.backend)


def layer_report(arguments: argparse.Namespace) -> str:
    """Measure times or memory; the whole Markdown file."""
    bench = bench_of(arguments)
    variants = [Variant.parse(text) for text in arguments.variants]
    bench.check(variants)
    if arguments.cpu_time and (bench.device.type != "cpu" or arguments.threads != 1):
        raise ConfigError("--cpu-time is of the host, and of one thread: say --threads 1")
    if arguments.memory:
        return memory_report(bench, variants, arguments.visual, arguments.text, arguments.command)
    sizing = Sizing(
        arguments.visual,
        arguments.text,
        arguments.rounds,
        arguments.seconds,
        arguments.compared_up_to,
        arguments.cpu_time,
    )
    initialize_distributed()  # megatron-core's groups of one rank
    return speed_report(bench, variants, sizing, arguments.command)


def main(arguments: list[str] | None = None) -> int:
    return report.run(layer_report, parse(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
