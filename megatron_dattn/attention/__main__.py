"""Show a preset: who attends to whom, with which positions, and what a layer of it costs.

python -m megatron_dattn.attention PRESET [--output picture.png] [--grid 24 24] [--text-rows 256]
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.cost import LayerSizes, attended_pairs, decoder_flops
from megatron_dattn.attention.drawing import draw_picture, draw_text
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.presets import PRESETS, get_preset
from megatron_dattn.attention.visual_rows import VisualRows, kept_grid
from megatron_dattn.errors import EXIT_USER_ERROR, ConfigError, UserError

_BASELINE = "s_attn"
_COLUMNS = ("preset", "V2V", "V2T", "T2V", "T2T", "projections", "attention", "FFN", "total")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        print(_describe(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _describe(options: argparse.Namespace) -> str:
    config = get_preset(options.preset)
    sizes = LayerSizes(**{f.name: getattr(options, f.name) for f in fields(LayerSizes)})
    table = cost_table({options.preset: config}, _sample(options), sizes, options.num_layers)
    if options.output is not None:
        draw_picture(config, _title(options.preset, config), options.output)
    return "\n".join((_title(options.preset, config), "", draw_text(config), "", table))


def _title(name: str, config: AttentionConfig) -> str:
    t2v, positions, rows = config.t2v, config.positions, config.visual
    changed = [
        f"{f.name} {getattr(rows, f.name)}"
        for f in fields(VisualRows)
        if getattr(rows, f.name) != f.default
    ]
    title = (
        f"{name}: v2v {config.v2v}, v2t {config.v2t}, "
        f"t2v {t2v.scope} {'rotated' if t2v.rotary else 'unrotated'}, merge {config.merge}\n"
        f"positions: text {positions.text}, visual {positions.visual}, "
        f"embedding {positions.embedding}"
    )
    return f"{title}\nvisual rows: {', '.join(changed)}" if changed else title


def cost_table(
    presets: dict[str, AttentionConfig], layout: TokenLayout, sizes: LayerSizes, num_layers: int
) -> str:
    """Scored pairs of a first layer, and a layer's operations forward, beside those of S-Attn."""
    baseline = decoder_flops(layout, get_preset(_BASELINE), sizes, num_layers).total
    lines = [
        f"Forward, {layout.num_visual_rows} visual and {layout.num_text_rows} text rows: thousands "
        f"of scored pairs in the first layer, and GFLOP per layer (mean of {num_layers})",
        _line(*_COLUMNS, f"of {_BASELINE}"),
    ]
    for name, config in (presets | {_BASELINE: get_preset(_BASELINE)}).items():
        kept = _kept(layout, config)
        pairs = attended_pairs(kept, config)
        flops = decoder_flops(kept, config, sizes, num_layers)
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


def _kept(layout: TokenLayout, config: AttentionConfig) -> TokenLayout:
    """The layout once the encoder has chosen the patches that enter the decoder."""
    images = tuple(replace(i, grid=kept_grid(i.grid, config.visual)) for i in layout.images)
    return replace(layout, images=images)


def _line(name: str, *cells: str) -> str:
    return f"{name:<14}" + "".join(f"{cell:>12}" for cell in cells)


def _sample(options: argparse.Namespace) -> TokenLayout:
    rows = options.grid[0] * options.grid[1]
    try:
        return TokenLayout(
            text_lengths=(options.text_rows,),
            images=(ImageSpan(0, options.text_before, tuple(options.grid)),),
            visual_budget=rows,
            text_budget=options.text_rows,
            prompt_lengths=(options.prompt_rows,),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron_dattn.attention", description=__doc__)
    parser.add_argument("preset", help=", ".join(PRESETS))
    parser.add_argument("--output", type=Path, help="also draw a picture into this file")
    sample = parser.add_argument_group("the sample whose cost is counted")
    sample.add_argument("--grid", type=int, nargs=2, default=(24, 24), metavar=("ROWS", "COLUMNS"))
    sample.add_argument("--text-rows", type=int, default=256)
    sample.add_argument("--text-before", type=int, default=32, help="text rows before the image")
    sample.add_argument("--prompt-rows", type=int, default=64, help="text rows without loss")
    layer = parser.add_argument_group("the decoder, by default Mistral-7B's")
    layer.add_argument("--num-layers", type=int, default=32)
    for size in fields(LayerSizes):
        layer.add_argument(f"--{size.name.replace('_', '-')}", type=int, default=size.default)
    return parser


if __name__ == "__main__":
    sys.exit(main())
