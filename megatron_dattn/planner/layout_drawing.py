"""A picture of parallel layouts: where the seconds of a step and the bytes of a rank go.

Two bars per layout, stacked of the terms of `step_time.py` and `memory.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_dattn.errors import UserError
from megatron_dattn.planner.memory import RankMemory
from megatron_dattn.planner.step_time import StepTime
from megatron_dattn.runtime.os_errors import explain

_COLORS = (
    *("#4c72b0", "#55a868", "#c44e52", "#8172b3", "#ccb974"),
    *("#64b5cd", "#dd8452", "#8c8c8c", "#da8bc3", "#937860"),
)


@dataclass(frozen=True)
class DrawnLayout:
    """A layout's name, and its two bars."""

    name: str
    time: StepTime
    memory: RankMemory


def draw_layouts(layouts: Sequence[DrawnLayout], title: str, capacity: float, path: Path) -> None:
    """Write the picture, of the kind that the ending names.

    Args:
        capacity: bytes of a GPU.

    Raises UserError for a file that cannot be written, and for an ending that names no kind.
    """
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise UserError(f"'{path}' names no kind of picture; end it in one of {', '.join(kinds)}")
    figure = Figure(figsize=(14, 2.2 + 0.45 * len(layouts)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    names = [layout.name for layout in layouts]
    _stack(left, names, [layout.time.terms for layout in layouts], 1.0)
    _stack(right, names, [layout.memory.terms for layout in layouts], 1e9)
    left.set_xlabel("modelled seconds of a step")
    right.set_xlabel("bytes of the fullest rank, GB")
    right.axvline(capacity / 1e9, color="black", lw=1, ls="--")
    left.invert_yaxis()  # of both: they share it
    figure.suptitle(title, fontsize=10)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise UserError(f"the picture cannot be written: {explain(error, path)}") from error


def _stack(
    axes: Axes, names: list[str], bars: Sequence[dict[str, float] | dict[str, int]], unit: float
) -> None:
    terms = list(dict.fromkeys(term for bar in bars for term in bar))
    begin = [0.0] * len(bars)
    for term, color in zip(terms, _COLORS, strict=False):
        lengths = [bar.get(term, 0) / unit for bar in bars]
        if any(lengths):
            axes.barh(names, lengths, left=begin, color=color, label=term.replace("_", " "))
        begin = [start + length for start, length in zip(begin, lengths, strict=True)]
    axes.legend(fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    axes.tick_params(labelsize=8)
