"""Records that are left out: told by number, and listed when all is done."""

import json
from pathlib import Path

import pytest

from megatron_dattn.data.missing import (
    MissingList,
    missing_image,
    read_exclusions,
    records_with_images,
    without,
)
from megatron_dattn.errors import DataError
from tests.unit.data.builders import record, save_image


def test_records_are_left_out_and_listed(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", seed=1)
    records = [record("<image>", "y", name) for name in ("a.png", "b.png", "a.png", "c\n.png")]
    assert [missing_image(value, str(tmp_path)) for value in records] == [
        None,
        "b.png",
        None,
        "c\n.png",
    ]
    with MissingList(tmp_path / "list.txt") as missing:
        kept = list(records_with_images(enumerate(records), tmp_path, missing))
        assert not (tmp_path / "list.txt").exists()
    assert [number for number, _ in kept] == [0, 2]
    assert (missing.count, missing.first) == (2, "b.png")
    lines = [line.split("\t") for line in (tmp_path / "list.txt").read_text().splitlines()]
    assert [(int(number), json.loads(name)) for number, name in lines] == [
        (1, "b.png"),
        (3, "c\n.png"),
    ]


def test_no_list_where_nothing_is_missing_or_all_fails(tmp_path: Path) -> None:
    with MissingList(tmp_path / "list.txt"):
        pass

    def fails() -> None:
        with MissingList(tmp_path / "list.txt") as missing:
            missing.add(1, "a.png")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fails()
    assert list(tmp_path.iterdir()) == []


def test_exclusions_by_number_and_file(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    entries = [("a.json", 5), ("a.json", 2), ("b/../b.json", 1)]
    lines = [json.dumps({"path": str(tmp_path / name), "record": n}) for name, n in entries]
    path.write_text("\n".join(lines))
    (tmp_path / "b").mkdir()
    excluded = read_exclusions(path)
    assert {name: list(numbers) for name, numbers in excluded.items()} == {
        str(tmp_path / "a.json"): [2, 5],
        str(tmp_path / "b.json"): [1],
    }
    records = list(enumerate("abcdefg"))
    kept = without(records, excluded[str(tmp_path / "a.json")])
    assert [record for _, record in kept] == list("abdeg")
    assert list(without(records, ())) == records


@pytest.mark.parametrize("text", ["{", "3", "[]", '{"path": "a"}', '{"path": 1, "record": 1}'])
def test_other_files_are_no_list(tmp_path: Path, text: str) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(DataError, match=r"check_data\.py --list"):
        read_exclusions(tmp_path / "list")
