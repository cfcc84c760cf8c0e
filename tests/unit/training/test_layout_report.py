"""What is said of layouts: rows, plain data, and settings that give the same layout again."""

import json
from pathlib import Path

import pytest

from megatron_dattn.config.cli import load_config, render_config
from megatron_dattn.training.layout_report import (
    MODELLED,
    as_json,
    as_yaml,
    recommendations,
    short_name,
    table,
)
from megatron_dattn.training.layout_search import LayoutSearch, search_layouts
from tests.unit.training.test_layout_search import H100, TINY


@pytest.fixture(scope="module")
def search() -> LayoutSearch:
    return search_layouts(TINY, 4, H100)


def test_the_table_says_what_it_is_and_why_others_are_not(search: LayoutSearch) -> None:
    lines = table(search, 3, 4, H100).splitlines()
    assert "stage1, attention dattn, global batch 32, on 4 h100, 8 per node" in lines[0]
    assert lines[1].startswith(MODELLED)
    assert "70% of the peak in products" in lines[1]
    (head,) = (line for line in lines if "step s" in line)
    rows = lines[lines.index(head) + 1 :][:3]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    assert all(" %" in row for row in rows)
    assert any("num_key_value_heads 2" in line for line in lines)
    refused = [int(line.split()[0]) for line in lines[lines.index(rows[-1]) + 3 :]]
    assert refused == sorted(refused, reverse=True)


def test_plain_data_adds_up(search: LayoutSearch) -> None:
    answer = json.loads(json.dumps(as_json(search, 2, 4, H100)))
    assert answer["modelled"] == MODELLED
    assert len(answer["layouts"]) == 2
    for layout in answer["layouts"]:
        assert sum(layout["seconds_by_term"].values()) == pytest.approx(layout["seconds"])
        assert sum(layout["bytes_by_term"].values()) == layout["bytes"]
        largest = max(layout["seconds_by_term"].values())
        assert layout["seconds_by_term"][layout["time_binds"]] == largest
    assert sum(reason["count"] for reason in answer["refused"])


def test_settings_give_the_same_layout_again(search: LayoutSearch, tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(render_config(TINY))
    for layout in search.distinct():
        file = tmp_path / "layout.yaml"
        file.write_text(as_yaml(layout))
        assert load_config(base, file) == layout.config


def test_recommendations_are_rows_of_a_page(search: LayoutSearch) -> None:
    head, rule, row = recommendations(search.fitting[:1]).splitlines()
    assert head.count("|") == rule.count("|") == row.count("|")
    assert row.startswith("| stage1 | 4 |")


def test_names_tell_layouts_apart(search: LayoutSearch) -> None:
    names = [short_name(layout) for layout in search.distinct()]
    assert len(set(names)) == len(names)
