"""From LLaVA's JSON to JSON lines with an index, and the command around it."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from megatron.energon.flavors.jsonl.jsonl_prepare import JsonlPreparator

from megatron_dattn.config.cli import load_config
from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.data.prepare import write_jsonl
from megatron_dattn.data.record_files import read_records
from tests.unit.data.builders import data_config, make_loader, make_records, record, save_image
from tools import check_data, prepare_data


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
    records, original = (list(read_records(p)) for p in (output / "llava.jsonl", source))
    assert [{**record, "key": None} for record in records] == [
        {**record, "key": None} for record in original
    ]


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_what_is_there_is_left_as_it_is(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = [str(source), "--output", str(output)]
    assert prepare_data.main(arguments) == 0
    before, said = contents(output), capsys.readouterr().out
    assert prepare_data.main(arguments) == 0
    assert capsys.readouterr().out == said
    changed = contents(output)
    assert {path: text for path, (_, text) in changed.items()} == {
        path: text for path, (_, text) in before.items()
    }
    data = output / "llava.jsonl"
    assert changed[data] == before[data]


def test_nothing_of_others_is_overwritten(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert prepare_data.main([str(source), "--output", str(output)]) == 0
    before = contents(output)
    other = source.with_name("other.json")
    for path, words in (
        (other, "train.yaml' exists already and names other data"),
        (source, f"'{source}' was changed since '{output / 'llava.jsonl'}' was made of it"),
    ):
        path.write_text(json.dumps([record("q", "a")]))
        capsys.readouterr()
        assert prepare_data.main([str(path), "--output", str(output)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
        assert contents(output) == before


def test_an_image_that_came_later_is_taken(source: Path, tmp_path: Path) -> None:
    records = json.loads(source.read_text())
    records[4]["image"] = "images/late.png"
    source.write_text(json.dumps(records))
    arguments = [str(source), "--output", str(tmp_path / "o"), "--drop-missing"]
    for start, missing in enumerate((1, 1, 0)):
        if start == 2:
            save_image(source.parent / "images" / "late.png", seed=1)
        assert prepare_data.main(arguments) == 0
        assert len(list(read_records(tmp_path / "o" / "llava.jsonl"))) == 10 - missing
        assert (tmp_path / "o" / "llava.missing.txt").exists() == bool(missing)


def test_train_and_validation_share_a_folder(source: Path, tmp_path: Path) -> None:
    for section, sampling in (("train", "first:8"), ("validation", "end:2")):
        mixture = tmp_path / f"{section}.yaml"
        entry = {"json_path": "in/llava.json", "sampling_strategy": sampling}
        mixture.write_text(yaml.safe_dump({"datasets": [entry]}))
        arguments = ["--mixture", str(mixture), "--output", str(tmp_path / "o")]
        assert prepare_data.main([*arguments, "--section", section]) == 0
    data = load_config(*(tmp_path / "o" / f"{name}.yaml" for name in ("train", "validation"))).data
    counts = [len(list(read_records(Path(e.path)))) for e in (*data.train, *data.validation)]
    assert counts == [8, 2]


@pytest.mark.parametrize("killed_behind", ["llava.source.json", "llava.jsonl", "llava.jsonl.idx"])
def test_a_killed_preparation_goes_on(source: Path, tmp_path: Path, killed_behind: str) -> None:
    output = tmp_path / "out"
    arguments = [str(source), "--output", str(output)]
    assert prepare_data.main(arguments) == 0
    whole = {path: text for path, (_, text) in contents(output).items()}
    order = ["llava.source.json", "llava.jsonl", "llava.jsonl.idx", "train.yaml"]
    for name in order[order.index(killed_behind) + 1 :]:
        (output / name).unlink()
    (output / "llava.jsonl.part").write_bytes(b"{")
    assert prepare_data.main(arguments) == 0
    left = {path: text for path, (_, text) in contents(output).items()}
    left.pop(output / "llava.jsonl.part", None)
    assert left == whole


def test_listed_records_are_left_out(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From check_data's list, which names the file in another way than prepare_data's user does."""
    records = json.loads(source.read_text())
    records[3]["image"], records[7]["conversations"] = "images/none.png", []
    source.write_text(json.dumps(records))
    listed, output = tmp_path / "bad.jsonl", tmp_path / "out"
    other_name = f"{source.parent}/../{source.parent.name}/{source.name}"
    assert check_data.main([other_name, "--list", str(listed)]) == 2
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(entry["record"], entry["reasons"]) for entry in entries] == [
        (3, ["missing_image"]),
        (7, ["bad_record"]),
    ]
    arguments = [str(source), "--without", str(listed), "--output", str(output)]
    assert prepare_data.main(arguments) == 0
    assert "8 records" in capsys.readouterr().out
    keys = [value["key"] for value in read_records(output / "llava.jsonl")]
    assert keys == [f"llava-{number:09d}" for number in (0, 1, 2, 4, 5, 6, 8, 9)]
    listed.write_text("".join(json.dumps({**entries[0], "record": n}) + "\n" for n in range(10)))
    arguments = [str(source), "--without", str(listed), "--output", str(tmp_path / "none")]
    assert prepare_data.main(arguments) == 2
    assert "all selected records" in capsys.readouterr().err
    elsewhere = {**entries[0], "path": str(output / "llava.jsonl")}
    listed.write_text(json.dumps(elsewhere))
    assert prepare_data.main(arguments) == 2
    assert "names records of" in capsys.readouterr().err
    listed.write_text("3\n")
    assert prepare_data.main(arguments) == 2
    assert "check_data.py --list" in capsys.readouterr().err


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
    written = list(read_records(output / "llava.jsonl"))
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
        "llava.source.json",
        "train.yaml",
    ]
    source.write_text(json.dumps([record("<image>", "y", "none.png")]))
    assert prepare_data.main([str(source), *arguments, str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "'none.png'" in error
    assert "--image-root" in error


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


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def can_be_read(text: str) -> bool:
    try:
        json.loads(text)
    except RecursionError:
        return False
    return True


def test_a_record_that_is_too_deep_to_be_written_is_one_error(tmp_path: Path) -> None:
    """How deep it may be differs by some frames between reading and writing, and by hundreds
    between versions of Python."""
    codes = set()
    limit = next(depth for depth in range(500, 100_000, 50) if not can_be_read(nested(depth)))
    for depth in range(limit - 150, limit + 50):
        deep = tmp_path / f"{depth}.json"
        deep.write_text(f'[{{"conversations": [], "x": {nested(depth)}}}]')
        codes.add(prepare_data.main([str(deep), "--output", str(tmp_path / str(depth))]))
    assert codes == {0, 2}
