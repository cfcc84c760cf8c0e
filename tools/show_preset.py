"""Show a preset: its source, who attends to whom, with which positions, and what it costs.

python tools/show_preset.py PRESET [--output picture.png] [--grid 24 24] [--text-tokens 256]
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dattn.attention import PRESETS
from megatron_dattn.errors import ConfigError
from megatron_dattn.planner.layer_sizes import LayerSizes
from megatron_dattn.runtime.tool import ToolParser, run_tool

if TYPE_CHECKING:
    from megatron_dattn.attention.layout import TokenLayout


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = _parser().parse_args(arguments)
    return run_tool(lambda: _show(options))


def _show(options: argparse.Namespace) -> int:
    for name in ("num_layers", "window", *(f.name for f in fields(LayerSizes))):
        number = getattr(options, name)
        if number is not None and number < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is at least 1; it is {number}")
    # Imported late: --help should not wait for torch and matplotlib.
    from megatron_dattn.planner.preset_description import describe_preset

    sizes = LayerSizes(**{f.name: getattr(options, f.name) for f in fields(LayerSizes)})
    print(
        describe_preset(
            options.preset,
            _sample(options),
            sizes,
            options.num_layers,
            options.window,
            options.output,
        )
    )
    return 0


def _sample(options: argparse.Namespace) -> "TokenLayout":
    from megatron_dattn.attention.layout import ImageSpan, TokenLayout

    tokens = options.grid[0] * options.grid[1]
    try:
        return TokenLayout(
            text_lengths=(options.text_tokens,),
            images=(ImageSpan(0, options.text_before, tuple(options.grid)),),
            visual_budget=tokens,
            text_budget=options.text_tokens,
            prompt_lengths=(options.prompt_tokens,),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(__doc__)
    parser.add_argument("preset", help=", ".join(PRESETS))
    parser.add_argument("--output", type=Path, help="also draw a picture into this file")
    sample = parser.add_argument_group("the sample whose cost is counted")
    sample.add_argument("--grid", type=int, nargs=2, default=(24, 24), metavar=("ROWS", "COLUMNS"))
    sample.add_argument("--text-tokens", type=int, default=256)
    sample.add_argument("--text-before", type=int, default=32, help="text tokens before the image")
    sample.add_argument("--prompt-tokens", type=int, default=64, help="text tokens without loss")
    layer = parser.add_argument_group("the decoder, by default Mistral-7B's")
    layer.add_argument("--num-layers", type=int, default=32)
    layer.add_argument("--window", type=int, help="sliding window of its layers, drawn and counted")
    for size in fields(LayerSizes):
        layer.add_argument(f"--{size.name.replace('_', '-')}", type=int, default=size.default)
    return parser


if __name__ == "__main__":
    sys.exit(main())
