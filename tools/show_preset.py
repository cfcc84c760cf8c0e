"""Show a preset: its source, who attends to whom, with which positions, and what it costs.

python tools/show_preset.py PRESET [--output picture.png] [--grid 24 24] [--text-tokens 256]
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.presets import NOTATION, PRESETS, get_preset
from megatron_dattn.attention.visual_config import VisualTokensConfig
from megatron_dattn.errors import ConfigError
from megatron_dattn.planner.decoder_flops import LayerSizes, attended_pairs, decoder_flops
from megatron_dattn.planner.preset_drawing import draw_picture, draw_text, kept_layout
from megatron_dattn.runtime.tool import run_tool

_BASELINE = "s_attn"
_COLUMNS = ("preset", "V2V", "V2T", "T2V", "T2T", "projections", "attention", "FFN", "total")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = _parser().parse_args(arguments)

    def work() -> int:
        print(_describe(options))
        return 0

    return run_tool(work)


def _describe(options: argparse.Namespace) -> str:
    config, layers, window = get_preset(options.preset), options.num_layers, options.window
    for name in ("num_layers", "window", *(f.name for f in fields(LayerSizes))):
        number = getattr(options, name)
        if number is not None and number < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is at least 1; it is {number}")
    sizes = LayerSizes(**{f.name: getattr(options, f.name) for f in fields(LayerSizes)})
    table = cost_table({options.preset: config}, _sample(options), sizes, layers, window)
    title = _title(options.preset, config, window)
    if options.output is not None:
        draw_picture(config, title, options.output, layers, window)
    about = f"{_about(config)}\n\n{NOTATION}\n\n" if config.about else ""
    return f"{title}\n\n{about}{draw_text(config, layers, window)}\n\n{table}"


def _about(config: AttentionConfig) -> str:
    """The preset in words; its cost begins a line."""
    words, cost, formulas = " ".join(config.about.split()).partition("Cost")
    return "\n".join(textwrap.fill(text, width=100) for text in (words, cost + formulas) if text)


def _title(name: str, config: AttentionConfig, window: int | None) -> str:
    t2v, positions, tokens = config.t2v, config.positions, config.visual
    changed = [
        f"{f.name} {getattr(tokens, f.name)}"
        for f in fields(VisualTokensConfig)
        if getattr(tokens, f.name) != f.default
    ]
    title = (
        f"{name}: v2v {config.v2v}, v2t {config.v2t}, "
        f"t2v {t2v.scope} {'rotated' if t2v.rotary else 'unrotated'}, merge {config.merge}\n"
        f"positions: text {positions.text}, visual {positions.visual}, "
        f"embedding {positions.embedding}"
    )
    if window is not None or t2v.window != "none":
        counted = "all tokens" if config.window_in_reading_order else "text tokens"
        hides = config.window_in_reading_order or t2v.window == "inherit"
        title += f"\nsliding window: {'of its layer' if window is None else window}, counts "
        title += f"{counted}, {'hides images' if hides else 'never hides images'}"
    return f"{title}\nvisual tokens: {', '.join(changed)}" if changed else title


def cost_table(
    presets: dict[str, AttentionConfig],
    layout: TokenLayout,
    sizes: LayerSizes,
    num_layers: int,
    window: int | None = None,
) -> str:
    """Scored pairs of a first layer, and a layer's operations forward, beside those of S-Attn."""
    baseline = decoder_flops(layout, get_preset(_BASELINE), sizes, num_layers, window).total
    lines = [
        f"Forward, {layout.num_visual_tokens} visual and {layout.num_text_tokens} text tokens: "
        f"thousands of scored pairs in the first layer, and GFLOP per layer (mean of {num_layers})",
        _line(*_COLUMNS, f"of {_BASELINE}"),
    ]
    for name, config in (presets | {_BASELINE: get_preset(_BASELINE)}).items():
        kept = kept_layout(layout, config.visual)
        pairs = attended_pairs(kept, config, window)
        flops = decoder_flops(kept, config, sizes, num_layers, window)
        parts = (flops.projections, flops.attention, flops.ffn, flops.total)
        lines.append(
            _line(
                name,
                *(f"{count / 1e3:.1f}" for count in pairs.values()),
                *(f"{part / num_layers / 1e9:.2f}" for part in parts),
                f"{flops.total / baseline:.3f}",
            )
        )
    return "\n".join(lines)


def _line(name: str, *cells: str) -> str:
    return f"{name:<14}" + "".join(f"{cell:>12}" for cell in cells)


def _sample(options: argparse.Namespace) -> TokenLayout:
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
