"""Pictures of a configuration: which row attends to which, and with which rotary positions.

Everything comes from the oracle's masks, for one small sample in reading order: a text row, an
image of 3 x 4 patches, two text rows, an image of 2 x 2, three text rows; four rows are its prompt.
"""

from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.positions import row_positions
from megatron_dattn.attention.reference import pair_masks

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


@dataclass(frozen=True)
class DrawnRow:
    """A row of the sample: its name, its position, and one mark of `LEGEND` per key row."""

    name: str  # V or T, and its place among the rows of its kind
    position: str  # "-" where no score rotates it
    marks: str


def drawn_rows(config: AttentionConfig) -> list[DrawnRow]:
    """The rows of the sample in reading order; `marks` are in that order too."""
    runs = SAMPLE.runs(0)
    order = [row for run in runs for row in range(run.start, run.end)]
    seen, rotated = (mask[order][:, order].tolist() for mask in pair_masks(SAMPLE, config))
    positions = row_positions(SAMPLE, config).tolist()
    rows = []
    for place, row in enumerate(order):
        is_visual = row < SAMPLE.visual_budget
        marks = [
            _HIDDEN if not sees else "#" if turns else "o"
            for sees, turns in zip(seen[place], rotated[place], strict=True)
        ]
        if is_visual and config.v2v == "diagonal":
            marks[place] = "="
        name = f"V{row}" if is_visual else f"T{row - SAMPLE.visual_budget}"
        has_position = not is_visual or config.positions.visual != "none"
        rows.append(DrawnRow(name, str(positions[row]) if has_position else "-", "".join(marks)))
    return rows


def draw_text(config: AttentionConfig) -> str:
    """The picture in characters: a line per query row, a column per key row."""
    rows = drawn_rows(config)
    lines = [LEGEND, "", "row  position  sees " + " ".join(row.name[0] for row in rows)]
    for row in rows:
        lines.append(f"{row.name:<3}  {row.position:>8}       " + " ".join(row.marks))
    return "\n".join(lines)


def draw_picture(config: AttentionConfig, title: str, path: Path) -> None:
    """The picture as an image file, of the kind that the ending names."""
    figure = Figure(figsize=(7.2, 7.2))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_pairs(axes, drawn_rows(config))
    axes.set_title(title)
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in _COLORS.values()]
    figure.legend(handles, _COLORS, loc="lower center", ncols=4, frameon=False)
    figure.text(0.5, 0.06, "dot: without positions   cross: own value", ha="center", fontsize=8)
    figure.subplots_adjust(left=0.14, right=0.97, top=0.87, bottom=0.11)
    figure.savefig(path, dpi=130)


def _draw_pairs(axes: Axes, rows: list[DrawnRow]) -> None:
    for place, row in enumerate(rows):
        for key, mark in enumerate(row.marks):
            if mark == _HIDDEN:
                continue
            color = _COLORS[f"{row.name[0]}2{rows[key].name[0]}"]
            axes.add_patch(Rectangle((key, place), 0.92, 0.92, color=color, lw=0))
            if mark == "o":
                axes.add_patch(Circle((key + 0.46, place + 0.46), 0.12, color="white", lw=0))
            elif mark == "=":
                axes.plot(key + 0.46, place + 0.46, "x", color="white", markersize=5)
    size = len(rows)
    axes.set(xlim=(-0.2, size + 0.1), ylim=(size + 0.1, -0.2), aspect="equal")
    places = [place + 0.46 for place in range(size)]
    axes.set_yticks(places, [f"{row.name} at {row.position}" for row in rows], fontsize=7)
    axes.set_xticks(places, [f"{row.name} at {row.position}" for row in rows], fontsize=7)
    axes.tick_params(axis="x", rotation=90, length=0, top=True, labeltop=True, labelbottom=False)
    axes.tick_params(axis="y", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
