"""Pictures of a configuration: which token attends to which, and with which rotary positions.

Everything comes from the oracle's masks, for one small sample in reading order: a text token, an
image of 3 x 4 patches, two text tokens, an image of 2 x 2, three text tokens; four tokens are its
prompt. Layers that differ have a panel each.
"""

from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.layers import LayerRule, layer_rules
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.positions import token_positions
from megatron_dattn.attention.reference import pair_masks
from megatron_dattn.attention.visual_config import VisualTokensConfig, kept_grid
from megatron_dattn.errors import UserError
from megatron_dattn.runtime.os_errors import explain

SAMPLE = TokenLayout(
    text_lengths=(6,),
    images=(ImageSpan(0, 1, (3, 4)), ImageSpan(0, 3, (2, 2))),
    visual_budget=16,
    text_budget=6,
    prompt_lengths=(4,),
)
LEGEND = "# rotated   o without positions   = own value   . not seen"

_COLORS = {"V2V": "#4c72b0", "V2T": "#8c8c8c", "T2V": "#dd8452", "T2T": "#55a868"}
_HIDDEN = "."
_PANEL = 7.2  # inches


@dataclass(frozen=True)
class DrawnToken:
    """A token of the sample: its name, its position, and one mark of `LEGEND` per key token."""

    name: str  # V or T, and its place among the tokens of its kind
    position: str  # "-" where no score rotates it
    marks: str


@dataclass(frozen=True)
class Panel:
    """The tokens of some layers, and what to say of these."""

    title: str
    tokens: list[DrawnToken]


def kept_layout(layout: TokenLayout, visual: VisualTokensConfig) -> TokenLayout:
    """The layout once the encoder has chosen the patches that enter the decoder."""
    images = tuple(replace(i, grid=kept_grid(i.grid, visual)) for i in layout.images)
    return replace(layout, images=images)


def panels(config: AttentionConfig, num_layers: int, window: int | None = None) -> list[Panel]:
    """One per kind of layer in a decoder of that depth, in the order of their first layers.

    `window` is the sliding window of every layer.
    """
    rules = layer_rules(config, num_layers, skip_unread=False)
    return [
        Panel(_panel_title(rule, rules, config), drawn_tokens(config, rule, window))
        for rule in dict.fromkeys(rules)
    ]


def drawn_tokens(
    config: AttentionConfig, rule: LayerRule | None = None, window: int | None = None
) -> list[DrawnToken]:
    """The tokens of the sample in reading order; `marks` are in that order too.

    `rule` says of which layer; by default of one that does all that `config` says.
    """
    rule = LayerRule(config) if rule is None else rule
    sample = kept_layout(SAMPLE, config.visual)
    layout = rule.layout(sample)
    order = [token for run in layout.runs(0) for token in range(run.start, run.end)]
    masks = pair_masks(layout, rule.attention, window)
    seen, rotated = (mask[order][:, order].tolist() for mask in masks)
    positions = token_positions(sample, config)[-layout.num_tokens :].tolist()
    tokens = []
    for place, token in enumerate(order):
        is_visual = token < layout.visual_budget
        marks = [
            _HIDDEN if not sees else "#" if turns else "o"
            for sees, turns in zip(seen[place], rotated[place], strict=True)
        ]
        if is_visual and rule.attention.v2v == "diagonal":
            marks[place] = "="
        name = f"V{token}" if is_visual else f"T{token - layout.visual_budget}"
        has_position = not is_visual or config.positions.visual != "none"
        tokens.append(
            DrawnToken(name, str(positions[token]) if has_position else "-", "".join(marks))
        )
    return tokens


def draw_text(config: AttentionConfig, num_layers: int, window: int | None = None) -> str:
    """The panels in characters: a line per query row, a column per key row."""
    lines = [LEGEND]
    for panel in panels(config, num_layers, window):
        lines += ["", panel.title]
        lines.append("     position  sees " + " ".join(token.name[0] for token in panel.tokens))
        for token in panel.tokens:
            lines.append(f"{token.name:<3}  {token.position:>8}       " + " ".join(token.marks))
    return "\n".join(lines)


def draw_picture(
    config: AttentionConfig, title: str, path: Path, num_layers: int, window: int | None = None
) -> None:
    """The panels as an image file, of the kind that the ending names.

    Raises UserError for a file that cannot be written, and for an ending that names no kind.
    """
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise UserError(f"'{path}' names no kind of picture; end it in one of {', '.join(kinds)}")
    if not path.parent.is_dir():
        raise UserError(f"'{path}' cannot be written: there is no folder '{path.parent}'")
    drawn = panels(config, num_layers, window)
    figure = Figure(figsize=(_PANEL * len(drawn), _PANEL))
    FigureCanvasAgg(figure)
    places = figure.subplots(1, len(drawn), squeeze=False)[0]
    widest = max(len(panel.tokens) for panel in drawn)
    for axes, panel in zip(places, drawn, strict=True):
        _draw_pairs(axes, panel.tokens, widest)
        axes.set_title(panel.title, fontsize=9, loc="left")
    figure.suptitle(title, fontsize=10)
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in _COLORS.values()]
    figure.legend(handles, _COLORS, loc="lower center", ncols=4, frameon=False)
    figure.text(0.5, 0.06, "dot: without positions   cross: own value", ha="center", fontsize=8)
    figure.subplots_adjust(left=0.14 / len(drawn), right=0.97, top=0.8, bottom=0.11)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UserError(f"the picture cannot be written: {explain(error, path)}") from error


def _panel_title(rule: LayerRule, rules: tuple[LayerRule, ...], config: AttentionConfig) -> str:
    numbers = [number for number, other in enumerate(rules, 1) if other == rule]
    if not rule.sees_images:
        what = "images are gone"
    elif rule.attention != config:
        what = "visual tokens are read and stay as they are"
    elif rule.visual_ffn not in (0.0, 1.0):
        what = f"visual tokens pass {rule.visual_ffn:g} of the FFN"
    else:
        return _ranges(numbers)
    return f"{_ranges(numbers)}: {what}"


def _ranges(numbers: list[int]) -> str:
    """ "layers 1 to 3, 7", of ascending numbers."""
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ]
    named = [f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return ("layer " if len(numbers) == 1 else "layers ") + ", ".join(named)


def _draw_pairs(axes: Axes, tokens: list[DrawnToken], size: int) -> None:
    """The panel in the upper left of room for `size` tokens, so that all have one scale."""
    for place, token in enumerate(tokens):
        for key, mark in enumerate(token.marks):
            if mark == _HIDDEN:
                continue
            color = _COLORS[f"{token.name[0]}2{tokens[key].name[0]}"]
            axes.add_patch(Rectangle((key, place), 0.92, 0.92, color=color, lw=0))
            if mark == "o":
                axes.add_patch(Circle((key + 0.46, place + 0.46), 0.12, color="white", lw=0))
            elif mark == "=":
                axes.plot(key + 0.46, place + 0.46, "x", color="white", markersize=5)
    axes.set(xlim=(-0.2, size + 0.1), ylim=(size + 0.1, -0.2), aspect="equal")
    places = [place + 0.46 for place in range(len(tokens))]
    axes.set_yticks(places, [f"{token.name} at {token.position}" for token in tokens], fontsize=7)
    axes.set_xticks(places, [f"{token.name} at {token.position}" for token in tokens], fontsize=7)
    axes.tick_params(axis="x", rotation=90, length=0, top=True, labeltop=True, labelbottom=False)
    axes.tick_params(axis="y", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
