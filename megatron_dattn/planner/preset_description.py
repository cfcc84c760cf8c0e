"""A preset in words, a drawing in characters and a table of what it costs beside S-Attn."""

import textwrap
from dataclasses import fields
from pathlib import Path

from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.presets import NOTATION, get_preset
from megatron_dattn.attention.visual_config import VisualTokensConfig
from megatron_dattn.planner.decoder_flops import decoder_flops
from megatron_dattn.planner.layer_sizes import LayerSizes
from megatron_dattn.planner.part_flops import attended_pairs
from megatron_dattn.planner.preset_drawing import draw_picture, draw_text, kept_layout

_BASELINE = "s_attn"
_COLUMNS = ("preset", "V2V", "V2T", "T2V", "T2T", "projections", "attention", "FFN", "total")


def describe_preset(
    name: str,
    layout: TokenLayout,
    sizes: LayerSizes,
    num_layers: int,
    window: int | None = None,
    output: Path | None = None,
) -> str:
    """All of it as text.

    Args:
        layout: the sample whose cost is counted.
        sizes: of a decoder layer.
        window: sliding window of every layer.
        output: file for a picture of the preset, if one is wanted.

    Raises:
        ConfigError: there is no such preset.
        UserError: the picture cannot be written.
    """
    config = get_preset(name)
    table = cost_table({name: config}, layout, sizes, num_layers, window)
    title = _title(name, config, window)
    if output is not None:
        draw_picture(config, title, output, num_layers, window)
    about = f"{_about(config)}\n\n{NOTATION}\n\n" if config.about else ""
    return f"{title}\n\n{about}{draw_text(config, num_layers, window)}\n\n{table}"


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
