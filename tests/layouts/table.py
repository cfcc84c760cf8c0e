"""The comparison's figures as the tables of docs/parallelism.md, between two marks."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_dattn.errors import ConfigError
from tests.layouts.cells import ATTENTIONS, Cell, matrix
from tests.layouts.compare import TOLERANCES, Deviation
from tests.layouts.resharding import MOVES, TOLERANCE, Move

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
        names = f"`{move.source}`", f"`{move.target}`"
        rows.append(_row([*names, what, _figure(loss, TOLERANCE)]))
    return "\n".join(rows)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _largest(deviations: list[Deviation], quantity: str) -> str:
    if not deviations:
        return ""
    largest = max(getattr(deviation, quantity) for deviation in deviations)
    return _figure(largest, TOLERANCES[quantity])


def _figure(value: float, limit: float) -> str:
    """In bold where it is too large."""
    return f"{value:.0e}" if value <= limit else f"**{value:.0e}**"


def lines_of_all() -> list[str]:
    """The lines that the page has to have, in their order; the figures stand for none."""
    exact = dict.fromkeys(matrix(), Deviation(0.0, 0.0, 0.0, ""))
    return (table(exact) + moves_table(dict.fromkeys(MOVES, 0.0))).splitlines()


def key(line: str) -> tuple[int, list[str]]:
    """What a line is about: all of its cells but the figures."""
    cells = line.split("|")
    return len(cells), cells[1:4]


def write(found: Mapping[Cell, Deviation], moves: Mapping[Move, float]) -> None:
    """Put what was found into the document's tables; what was not compared stays as it was.

    Raises:
        ConfigError: a line is incomplete, is none of the page's or was never compared.
    """
    names = dict.fromkeys(cell.layout.name for cell in found)
    if set(found) != set(matrix(names)) or set(found) - set(matrix()):
        raise ConfigError(
            "a line of the page is a layout of tests/layouts/cells.py with all its models and "
            "stages: write those alone"
        )
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    present, after = rest.split(END)
    lines = [*present.splitlines(), *(table(found) + moves_table(moves)).splitlines()]
    chosen = [[line for line in lines if key(line) == key(wanted)] for wanted in lines_of_all()]
    if not all(chosen):
        missing = [
            wanted for wanted, found in zip(lines_of_all(), chosen, strict=True) if not found
        ]
        raise ConfigError(f"compare these too, or all: {'; '.join(missing)}")
    content = "\n".join((BEGIN, *(same[-1] for same in chosen), END))
    DOCUMENT.write_text(before + content + after, encoding="utf-8")
