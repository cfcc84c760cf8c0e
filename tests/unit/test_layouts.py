"""Names of layouts, and the page's tables: as the comparison writes them."""

import re

import pytest

from megatron_dattn.errors import ConfigError
from tests.layouts.cells import FURTHER_LAYOUTS, IN_EVERY_TEST_RUN, LAYOUTS, Cell, matrix
from tests.layouts.compare import TOLERANCES, Deviation
from tests.layouts.layout import Layout
from tests.layouts.refused import list_of_answers
from tests.layouts.resharding import MOVES, TOLERANCE
from tests.layouts.table import BEGIN, DOCUMENT, END, moves_table, table


def test_a_name_says_all_settings() -> None:
    layout = Layout("tp2xpp3xdp4+sp+distopt")
    assert layout.num_ranks == 24
    assert layout.settings == {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 3,
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
    assert len(matrix()) == 8 * len(LAYOUTS) + 4 * len(FURTHER_LAYOUTS)
    assert {cell.layout.num_ranks for cell in matrix()} == {2, 4}


def _without_figures(text: str) -> list[str]:
    figure = re.compile(r"(?<=\| )(\*\*)?\d(e[-+]\d\d|inf)?(\*\*)?(?= \|)")
    return [figure.sub("...", line) for line in text.splitlines()]


def test_the_page_holds_the_table_of_all_layouts() -> None:
    """Every row and column that the whole comparison writes, and no figure above its limit."""
    page = DOCUMENT.read_text(encoding="utf-8")
    written = page[page.index(BEGIN) : page.index(END) + len(END)]
    small = Deviation(*TOLERANCES.values(), worst="")
    expected = table(dict.fromkeys(matrix(), small))
    expected += moves_table(dict.fromkeys(MOVES, TOLERANCE))
    assert _without_figures(written) == _without_figures(f"{BEGIN}\n{expected}\n{END}")
    assert "**" not in written


def test_the_page_holds_every_refusal_as_it_is_said() -> None:
    assert list_of_answers() in DOCUMENT.read_text(encoding="utf-8"), "put it in anew"
