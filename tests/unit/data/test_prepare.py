"""From LLaVA's JSON to JSON lines with an index, and the command around it."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from megatron.energon.flavors.jsonl.jsonl_prepare import JsonlPreparator

from megatron_dattn.config.cli import load_config
from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.data.prepare import (
    Source,
    read_mixture,
    read_records,
    select_records,
    write_jsonl,
)
from megatron_dattn.errors import DataError
from tests.unit.data.builders import data_config, make_loader, make_records, record
from tools import prepare_data


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "llava.json"
    records = make_records(path.parent, 10)
    path.write_text(json.dumps(records))
    return path


def test_the_index_is_energons(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert write_jsonl([{"x": "\u00e9\n"}, {}, {"y": 2}], path) == 3
    index = Path(f"{path}.idx").read_bytes()
    JsonlPreparator.prepare_dataset(str(path))
    assert Path(f"{path}.idx").read_bytes() == index


def test_the_command_writes_what_the_loader_reads(
    source: Path, tmp_path: Path, processor: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert prepare_data.main([str(source), "--output", str(output)]) == 0
    assert "10 records" in capsys.readouterr().out
    output = output.rename(tmp_path / "moved")  # and is found there
    (dataset,) = load_config(output / "train.yaml").data.train
    batches = list(make_loader(data_config(processor), [dataset], training=False))
    keys = [key for batch in batches for key in batch.sample_keys]
    assert keys == [f"llava-{index:09d}" for index in range(10)]
    records = read_records(output / "llava.jsonl")
    original = read_records(source)
    assert [{**record, "key": None} for record in records] == [
        {**record, "key": None} for record in original
    ]


def test_nothing_is_overwritten(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert prepare_data.main([str(source), "--output", str(output)]) == 0
    before = {path: path.read_bytes() for path in output.iterdir()}
    assert prepare_data.main([str(source), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert "exists already" in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in output.iterdir()} == before


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    def records() -> object:
        yield {}
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_jsonl(records(), tmp_path / "a.jsonl")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_mixture_samples_weighs_and_names(source: Path, tmp_path: Path) -> None:
    mixture = tmp_path / "mixture.yaml"
    entries = [
        {"json_path": "in/llava.json", "sampling_strategy": "first:3", "weight": 2},
        {"json_path": "in/llava.json", "sampling_strategy": "end:20%", "image_root": "in"},
    ]
    mixture.write_text(yaml.safe_dump({"datasets": entries}))
    output = tmp_path / "out"
    arguments = ["--mixture", str(mixture), "--output", str(output), "--section", "validation"]
    assert prepare_data.main(arguments) == 0
    section = load_config(output / "validation.yaml").data.validation
    assert [Path(entry.path) for entry in section] == [
        output / "llava.jsonl",
        output / "llava-2.jsonl",
    ]
    assert [entry.weight for entry in section] == [2.0, 1.0]
    assert [record["key"] for record in read_records(output / "llava-2.jsonl")] == [
        "llava-2-000000008",
        "llava-2-000000009",
    ]


def test_a_mixture_is_read_as_meant(tmp_path: Path) -> None:
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text("datasets: [{json_path: 007, image_root: on, weight: 1e-1}]\n")
    assert read_mixture(mixture) == [Source(tmp_path / "007", tmp_path / "on", 0.1)]


def test_data_sets_prepared_before_name_their_files_absolutely(tmp_path: Path) -> None:
    entry = {"path": str(tmp_path / "a.jsonl"), "image_root": str(tmp_path), "weight": 1.0}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({"data": {"train": [entry]}}))
    assert load_config(tmp_path / "train.yaml").data.train == [DatasetConfig(**entry)]


def test_shares_are_the_selected_records_times_the_weight(
    source: Path, tmp_path: Path, processor: Path
) -> None:
    mixture = tmp_path / "mixture.yaml"
    entries = [
        {"json_path": "in/llava.json"},
        {"json_path": "in/llava.json", "sampling_strategy": "first:20%"},
        {"json_path": "in/llava.json", "sampling_strategy": "end:3", "weight": 2},
    ]
    mixture.write_text(yaml.safe_dump({"datasets": entries}))
    assert prepare_data.main(["--mixture", str(mixture), "--output", str(tmp_path / "o")]) == 0
    datasets = load_config(tmp_path / "o" / "train.yaml").data.train
    loader = make_loader(data_config(processor), datasets)
    shown: list[str] = []
    for batch in loader:
        shown += batch.sample_keys
        if len(shown) >= 18:
            break
    counts = Counter(key.rsplit("-", 1)[0] for key in shown[:18])
    assert counts == {"llava": 10, "llava-2": 2, "llava-3": 6}


def test_records_without_their_images_are_dropped_and_listed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads(source.read_text())
    gone = ["none.png", "images/\n.png", "../llava.json", "a\0b", "x" * 5000]
    for number, image in enumerate(gone):
        records.insert(3 * number, record("<image><image>", "y", ["images/0.png", image]))
    kept = [record("<image>", "y", "data:image/png;base64,AA"), {"image": 3}, "odd"]
    source.write_text(json.dumps([*records, *kept]))
    output = tmp_path / "out"
    assert prepare_data.main([str(source), "--output", str(output), "--drop-missing"]) == 0
    assert "13 records" in (said := capsys.readouterr().out)
    assert "5 without their images left out" in said
    listed = [line.split("\t") for line in (output / "llava.missing.txt").read_text().splitlines()]
    assert [(int(number), json.loads(image)) for number, image in listed] == [
        (3 * number, image) for number, image in enumerate(gone)
    ]
    written = read_records(output / "llava.jsonl")
    assert len(written) == 13
    assert written[-1] == "odd"
    assert written[0]["key"] == "llava-000000001"


def test_nothing_to_drop_leaves_no_list_and_all_to_drop_is_an_error(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--drop-missing", "--output"]
    assert prepare_data.main([str(source), *arguments, str(tmp_path / "all")]) == 0
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == [
        "llava.jsonl",
        "llava.jsonl.idx",
        "train.yaml",
    ]
    source.write_text(json.dumps([record("<image>", "y", "none.png")]))
    assert prepare_data.main([str(source), *arguments, str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "'none.png'" in error
    assert "--image-root" in error


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le"])
def test_byte_order_marks_and_wide_characters_are_read(tmp_path: Path, encoding: str) -> None:
    records = [record("q", "a \u00e9"), record("q", "b")]
    (tmp_path / "a.json").write_text(json.dumps(records, ensure_ascii=False), encoding=encoding)
    lines = "\n".join(json.dumps(value, ensure_ascii=False) for value in records)
    (tmp_path / "b.jsonl").write_text(lines, encoding=encoding)
    for name in ("a.json", "b.jsonl"):
        assert read_records(tmp_path / name) == records


def test_marks_between_files_that_were_joined_are_no_text(tmp_path: Path) -> None:
    line = (json.dumps(record("q", "a")) + "\r\n").encode("utf-8-sig")
    (tmp_path / "a.jsonl").write_bytes(line + line)
    assert read_records(tmp_path / "a.jsonl") == [record("q", "a")] * 2


def test_sampling_strategies() -> None:
    records = [f"record{index}" for index in range(10)]
    assert select_records(records, "all") == list(enumerate(records))
    assert select_records(records, "first:2") == [(0, "record0"), (1, "record1")]
    assert select_records(records, "end:15%") == [(8, "record8"), (9, "record9")]
    drawn = select_records(records, "random:5", seed=1)
    assert len(drawn) == 5
    assert drawn == sorted(drawn) == select_records(records, "random:5", seed=1)
    assert drawn != select_records(records, "random:5", seed=2)
    for strategy in ("some", "first:", "first:0", "random:1.5"):
        with pytest.raises(DataError, match=strategy.replace(".", r"\.")):
            select_records(records, strategy)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("none.json", None, "does not exist"),
        ("bad.json", "{", "cannot be read as JSON"),
        ("bad.jsonl", '{"a": 1}\n{', "cannot be read as JSON"),
        ("object.json", "{}", "must hold a list"),
        ("empty.json", "[]", "at least one"),
    ],
)
def test_unreadable_inputs_are_named(
    tmp_path: Path, name: str, content: str | None, text: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=text) as caught:
        read_records(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "datasets: []",
        "datasets: [{path: x}]",
        "datasets: [{json_path: x, n: 1}]",
        "datasets: [{json_path: [5]}]",
        "datasets: [{json_path: x, weight: 1:30}]",
        "datasets: [{json_path: x, weight: heavy}]",
        "datasets: [{json_path: x, weight: 0}]",
        "datasets: [{json_path: x, weight: 665298}]",
        "\xff",
    ],
)
def test_mixtures_of_another_form_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mixture.yaml"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match="mixture"):
        read_mixture(path)


def test_an_output_that_is_a_file_is_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "o").touch()
    assert prepare_data.main([str(source), "--output", str(tmp_path / "o")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_inputs_and_a_mixture_exclude_each_other(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare_data.main(["--output", str(tmp_path / "o")]) == 2
    arguments = [str(source), "--mixture", "m.yaml", "--output", str(tmp_path / "o")]
    assert prepare_data.main(arguments) == 2
    assert capsys.readouterr().err.count("--mixture") == 2
