"""The picture of layouts is written, or the reason why not is one line."""

from pathlib import Path

import pytest

from megatron_dattn.errors import UserError
from megatron_dattn.planner.layout_drawing import DrawnLayout, draw_layouts
from megatron_dattn.planner.step_time import StepTime
from tests.support.planner import memory_of

LAYOUTS = [
    DrawnLayout("2 x 1 x 4", StepTime(products=2.0, bubble=1.0), memory_of()),
    DrawnLayout("1 x 1 x 8", StepTime(products=2.5), memory_of()),
]


def test_both_bars_name_their_terms(tmp_path: Path) -> None:
    path = tmp_path / "layouts.svg"
    draw_layouts(LAYOUTS, "two layouts", 80e9, path)
    assert path.read_text().startswith("<?xml")
    png = tmp_path / "layouts.png"
    draw_layouts(LAYOUTS, "two layouts", 80e9, png)
    assert png.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no kind of picture"):
        draw_layouts(LAYOUTS, "t", 80e9, tmp_path / "layouts.txt")
    with pytest.raises(UserError, match="cannot be written"):
        draw_layouts(LAYOUTS, "t", 80e9, tmp_path / "missing" / "layouts.png")
