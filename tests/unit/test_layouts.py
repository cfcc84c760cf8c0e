"""Names of layouts, and the page's tables: as the comparison writes them."""

import math
import re
from pathlib import Path

import pytest

from megatron_dattn.errors import ConfigError
from tests.layouts.cells import (
    FAMILIES,
    FURTHER_LAYOUTS,
    IN_EVERY_TEST_RUN,
    LAYOUTS,
    STAGES,
    Cell,
    matrix,
)
from tests.layouts.compare import TOLERANCES, Deviation
from tests.layouts.layout import Layout
from tests.layouts.refused import list_of_answers
from tests.layouts.resharding import MOVES
from tests.layouts.table import BEGIN, DOCUMENT, END, key, lines_of_all, write


def test_a_name_says_all_settings() -> None:
    layout = Layout("tp2xpp3xvp2xcp5xdp4+sp+distopt")
    assert layout.num_ranks == 120
    assert layout.settings == {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 3,
        "virtual_pipeline_model_parallel_size": 2,
        "context_parallel_size": 5,
        "sequence_parallel": True,
        "use_distributed_optimizer": True,
    }
    config = Cell(layout, "s_attn", "gemma2", 1).config()
    assert (config.model.attention, config.model.language.family) == ("s_attn", "gemma2")
    assert config.parallel.pipeline_model_parallel_size == 3
    assert config.parallel.sequence_parallel


@pytest.mark.parametrize(
    "name", ["tp", "sp", "tp2pp2", "tp2+", "tp2xep2", "tp2+zero", "TP2", "tp0"]
)
def test_what_names_no_layout_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="names no layout"):
        Layout(name)


def test_every_cell_can_be_named() -> None:
    for cell in matrix():
        assert Cell.parse(str(cell)) == cell
    assert {Cell.parse(name) for name in IN_EVERY_TEST_RUN} <= set(matrix())
    cells = {name: [str(cell) for cell in matrix([name])] for name in (*LAYOUTS, *FURTHER_LAYOUTS)}
    assert [str(cell) for cell in matrix()] == [cell for some in cells.values() for cell in some]
    assert len(cells["pp2"]) == 8
    assert cells["cp2"] == [f"cp2/dattn/{family}/{n}" for family in FAMILIES for n in STAGES]
    assert cells["cp2+full"] == [f"cp2+full/dattn/{family}/3" for family in FAMILIES]
    assert {cell.layout.num_ranks for cell in matrix()} == {2, 4}


def test_the_page_holds_the_table_of_all_layouts() -> None:
    """Every row and column that the whole comparison writes, and no figure above its limit."""
    page = DOCUMENT.read_text(encoding="utf-8")
    written = page[page.index(BEGIN) + len(BEGIN) + 1 : page.index(END)].splitlines()
    assert list(map(key, written)) == list(map(key, lines_of_all()))
    figure = re.compile(r"\d(e[-+]\d\d)?")
    for line, wanted in zip(written, lines_of_all(), strict=True):
        assert figure.sub("0", line) == figure.sub("0", wanted)


def test_what_was_compared_is_written_and_the_rest_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("\n".join(("Before.", BEGIN, *lines_of_all(), END, "After.")))
    monkeypatch.setattr("tests.layouts.table.DOCUMENT", page)
    limits = Deviation(*TOLERANCES.values(), worst="")
    off = Deviation(2e-13, math.inf, 3e-9, worst="")
    found = dict.fromkeys(matrix(["pp2"]), limits) | dict.fromkeys(matrix(["cp2"]), off)
    write(found, {MOVES[0]: 3e-6})
    lines = page.read_text().splitlines()
    assert len(lines) == len(lines_of_all()) + 4
    assert [line for line in lines[2:-2] if line not in lines_of_all()] == [
        "| `pp2` | 2 | 1, 3 | 1e-13 | 1e-11 | 1e-08 | 1e-13 | 1e-11 | 1e-08 |",
        "| `cp2` | 2 | 1, 3 | **2e-13** | **inf** | 3e-09 |  |  |  |",
        "| `tp2+sp` | `pp2` | resumed | **3e-06** |",
    ]
    page.write_text("\n".join(line for line in lines if "`cp2`" not in line))
    with pytest.raises(ConfigError, match=r"compare these too, or all: \| `cp2` \| 2"):
        write({}, {})


def test_the_page_holds_every_refusal_as_it_is_said() -> None:
    assert list_of_answers() in DOCUMENT.read_text(encoding="utf-8"), "put it in anew"
