"""Files of records are read one by one, as they would be read whole."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dattn.data import record_files
from megatron_dattn.data.record_files import read_records, select_records
from megatron_dattn.errors import DataError
from tests.unit.data.builders import record


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le"])
def test_byte_order_marks_and_wide_characters_are_read(tmp_path: Path, encoding: str) -> None:
    records = [record("q", "a \u00e9"), record("q", "b")]
    (tmp_path / "a.json").write_text(json.dumps(records, ensure_ascii=False), encoding=encoding)
    lines = "\n".join(json.dumps(value, ensure_ascii=False) for value in records)
    (tmp_path / "b.jsonl").write_text(lines, encoding=encoding)
    for name in ("a.json", "b.jsonl"):
        assert list(read_records(tmp_path / name)) == records


def test_marks_between_files_that_were_joined_are_no_text(tmp_path: Path) -> None:
    line = (json.dumps(record("q", "a")) + "\r\n").encode("utf-8-sig")
    (tmp_path / "a.jsonl").write_bytes(line + line)
    assert list(read_records(tmp_path / "a.jsonl")) == [record("q", "a")] * 2


def write(folder: Path, records: Any, name: str = "a.json") -> Path:
    (folder / name).write_text(json.dumps(records))
    return folder / name


def test_sampling_strategies(tmp_path: Path) -> None:
    records = [f"record{index}" for index in range(10)]
    path = write(tmp_path, records)

    def select(sampling: str, seed: int = 0) -> list[tuple[int, Any]]:
        return list(select_records(path, sampling, seed=seed))

    assert select("all") == list(enumerate(records))
    assert select("first:2") == [(0, "record0"), (1, "record1")]
    assert select("first:11%") == [(0, "record0"), (1, "record1")]
    assert select("first:99") == select("end:99") == select("random:100%") == select("all")
    assert select("end:15%") == [(8, "record8"), (9, "record9")]
    drawn = select("random:5", seed=1)
    assert len(drawn) == 5
    assert drawn == sorted(drawn) == select("random:5", seed=1)
    assert drawn != select("random:5", seed=2)
    for sampling in ("some", "first:", "first:0", "random:0%", "random:1.5"):
        with pytest.raises(DataError, match=sampling.replace(".", r"\.")):
            select(sampling)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    st.lists(values, min_size=1, max_size=5),
    st.sampled_from([None, 0, 3]),
    st.booleans(),
    st.integers(1, 9),
)
def test_every_list_is_read_as_it_would_be_whole(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[Any],
    indent: int | None,
    ascii_only: bool,
    characters: int,
) -> None:
    path = tmp_path_factory.mktemp("list") / "a.json"
    path.write_text(json.dumps(records, indent=indent, ensure_ascii=ascii_only) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_files, "_CHARACTERS_AT_A_TIME", characters)
        assert list(read_records(path)) == records


@settings(deadline=None)
@given(st.text(st.sampled_from('[]{},:"1e-. \ntrue'), max_size=12), st.integers(1, 4))
def test_what_is_no_list_is_refused_as_it_would_be_whole(
    tmp_path_factory: pytest.TempPathFactory, text: str, characters: int
) -> None:
    path = tmp_path_factory.mktemp("list") / "a.json"
    path.write_text(text)
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_files, "_CHARACTERS_AT_A_TIME", characters)
        if isinstance(whole, list) and whole:
            assert list(read_records(path)) == whole
        else:
            with pytest.raises(DataError, match=r"a\.json"):
                list(read_records(path))


def test_a_record_without_an_end_is_not_read_to_the_end_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_files, "_MAX_CHARACTERS", 100)
    monkeypatch.setattr(record_files, "_CHARACTERS_AT_A_TIME", 10)
    (tmp_path / "a.json").write_text('[{"a": 1}, {"b": "' + "x" * 10_000)
    records = read_records(tmp_path / "a.json")
    assert next(records) == {"a": 1}
    with pytest.raises(DataError, match="from record 1 on: Unterminated string"):
        next(records)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    """32 MiB are read with less than 12: some blocks of text, and no records."""
    line = json.dumps(record("q" * 1000, "a" * 1000)) + ("\n" if name == "a.jsonl" else ",")
    count = 2**25 // len(line)
    text = line * count
    if name == "a.json":
        text = f"[{text[:-1]}]"
    (tmp_path / name).write_text(text)
    del text
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_records(tmp_path / name)) == count
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("none.json", None, "does not exist"),
        ("bad.json", "{", "cannot be read as JSON"),
        ("bad.jsonl", '{"a": 1}\n{', "cannot be read as JSON"),
        ("object.json", "{}", "must hold a list"),
        ("empty.json", "[]", "at least one"),
        ("empty.jsonl", "\n \n", "at least one"),
        ("nothing.json", "", "cannot be read as JSON"),
        ("two.json", "[1] [2]", "behind the end of the list"),
        ("cut.json", "[1, 2", "expected ',' or ']'"),
    ],
)
def test_unreadable_inputs_are_named(
    tmp_path: Path, name: str, content: str | None, text: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=text) as caught:
        list(read_records(tmp_path / name))
    assert name in str(caught.value)
