"""The comparison's figures as the tables of docs/parallelism.md, between two marks."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.layouts.cells import ATTENTIONS, Cell, matrix
from tests.layouts.compare import TOLERANCES, Deviation
from tests.layouts.resharding import MOVES, Move

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "parallelism.md"
BEGIN, END = "<!-- layouts: begin -->", "<!-- layouts: end -->"


def table(found: Mapping[Cell, Deviation]) -> str:
    """One row for each layout, with the largest deviation over families and stages."""
    head = ["layout", "ranks", "stages"]
    for attention in ATTENTIONS:
        first, *others = TOLERANCES
        head += [f"`{attention}`: {first}", *others]
    rows = [_row(head), "|---" * len(head) + "|"]
    for layout in dict.fromkeys(cell.layout for cell in found):
        cells = [cell for cell in found if cell.layout == layout]
        stages = ", ".join(str(stage) for stage in sorted({cell.stage for cell in cells}))
        row = [f"`{layout.name}`", f"{layout.num_ranks}", stages]
        for attention in ATTENTIONS:
            chosen = [found[cell] for cell in cells if cell.attention == attention]
            row += [_largest(chosen, quantity) for quantity in TOLERANCES]
        rows.append(_row(row))
    return "\n".join(rows)


def moves_table(found: Mapping[Move, float]) -> str:
    """One row for each pair of layouts, with the largest deviation of a loss."""
    rows = ["", "", _row(["saved under", "gone on with under", "", "loss"]), "|---|---|---|---|"]
    for move, loss in found.items():
        what = "stage 3 from stage 1" if move.new_stage else "resumed"
        rows.append(_row([f"`{move.source}`", f"`{move.target}`", what, f"{loss:.0e}"]))
    return "\n".join(rows)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _largest(deviations: list[Deviation], quantity: str) -> str:
    """In bold where it is too large."""
    if not deviations:
        return ""
    value = max(getattr(deviation, quantity) for deviation in deviations)
    return f"{value:.0e}" if value <= TOLERANCES[quantity] else f"**{value:.0e}**"


def write(found: Mapping[Cell, Deviation], moves: Mapping[Move, float]) -> None:
    """Put the tables in place of the document's."""
    assert list(found) == matrix(), "a table of all layouts"
    assert tuple(moves) == MOVES, "a table of all moves"
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    content = "\n".join((BEGIN, table(found) + moves_table(moves), END))
    DOCUMENT.write_text(before + content + after, encoding="utf-8")
