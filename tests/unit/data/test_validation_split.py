"""Validation is split off by image: no image is on both sides, whatever the order."""

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_dattn.config.cli import load_config
from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.data.dataset import open_dataset
from megatron_dattn.data.energon import WorkerConfig
from megatron_dattn.data.image_files import read_image_file
from megatron_dattn.data.mixture import Source
from megatron_dattn.data.record_source import RawRecord, ValidationRecords
from megatron_dattn.data.validation_split import Split, split_by_image
from megatron_dattn.errors import ConfigError, DataError
from tests.unit.data.builders import record, save_image
from tools import prepare_data

on_a_path = settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


def asked(number: int, images: list[str]) -> dict[str, Any]:
    return record("<image>" * len(images) + f"{number} ?", "a", images)


def sources_of(folder: Path, *files: list[Any]) -> list[Source]:
    sources = []
    for number, records in enumerate(files):
        path = folder / f"set{number}.json"
        path.write_text(json.dumps(records))
        sources.append(Source(path, folder / "images"))
    return sources


def read_lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def sides(split: Split, sources: list[Source]) -> list[list[bool]]:
    """For each record of each source, whether it is on the validation side."""
    found = []
    for source in sources:
        name = str(source.path.resolve())
        train, validation = (side.get(name, []) for side in (split.train, split.validation))
        assert sorted([*train, *validation]) == list(range(len(train) + len(validation)))
        found.append([number in set(validation) for number in range(len(train) + len(validation))])
    return found


images_of_records = st.lists(st.lists(st.integers(0, 30), max_size=3), min_size=4, max_size=40)


@on_a_path
@given(
    named=images_of_records,
    share=st.floats(0.05, 0.9),
    seed=st.integers(0, 9),
    order=st.randoms(use_true_random=False),
)
def test_no_image_is_on_both_sides_in_any_order(
    named: list[list[int]], share: float, seed: int, order: random.Random, tmp_path: Path
) -> None:
    records = [asked(n, [f"{i}.png" for i in images]) for n, images in enumerate(named)]
    half = len(records) // 2
    sources = sources_of(tmp_path, records[:half], records[half:])
    try:
        split = split_by_image(sources, share=share, seed=seed)
    except DataError as error:
        if "cannot be split off" not in str(error):
            raise
        return
    flags = [flag for side in sides(split, sources) for flag in side]
    assert 0 < sum(flags) <= max(1, round(share * len(records)))
    seen = defaultdict(set)
    for images, flag in zip(named, flags, strict=True):
        for image in images:
            seen[image].add(flag)
    assert all(len(found) == 1 for found in seen.values())

    places = list(range(len(records)))
    order.shuffle(places)
    shuffled = sources_of(tmp_path, [records[place] for place in places])
    (again,) = sides(split_by_image(shuffled, share=share, seed=seed), shuffled)
    assert again == [flags[place] for place in places]


def test_the_share_is_met_where_images_allow_it(tmp_path: Path) -> None:
    records = [asked(n, [f"{n // 2}.png"]) for n in range(1000)]
    sources = sources_of(tmp_path, records)
    by_seed = [sides(split_by_image(sources, share=0.05, seed=s), sources) for s in (1, 2)]
    assert [sum(flags) for (flags,) in by_seed] == [50, 50]
    assert by_seed[0] != by_seed[1]


def test_what_is_left_out_is_on_no_side(tmp_path: Path) -> None:
    """Nor does it hold others together: its images are not used."""
    records = [asked(0, ["1.png"]), asked(1, ["1.png", "2.png"]), asked(2, ["2.png"])]
    (source,) = sources_of(tmp_path, records)
    excluded = {str(source.path.resolve()): [1]}
    split = split_by_image([source], share=0.5, seed=0, excluded=excluded)
    ((train,), (validation,)) = split.train.values(), split.validation.values()
    assert sorted([*train, *validation]) == [0, 2]


def test_one_image_by_several_names_is_one(tmp_path: Path) -> None:
    names = ["1.png", "./1.png", "x/../1.png", str((tmp_path / "images" / "1.png").resolve())]
    records = [asked(n, [name]) for n, name in enumerate(names)] + [asked(9, ["2.png"])]
    sources = sources_of(tmp_path, records)
    (flags,) = sides(split_by_image(sources, share=0.2, seed=0), sources)
    assert flags == [False, False, False, False, True]


def test_what_cannot_be_split_is_one_error(tmp_path: Path) -> None:
    sources = sources_of(tmp_path, [asked(n, ["1.png"]) for n in range(10)])
    with pytest.raises(DataError, match="in 1 groups, the largest of 10 records"):
        split_by_image(sources, share=0.5, seed=0)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        split_by_image(sources, share=1.0, seed=0)


def test_both_sections_are_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    first, second = sources_of(
        tmp_path, [asked(n, [f"{n // 4}.png"]) for n in range(80)], [record("q", "a")] * 3
    )
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"path": str(first.path), "record": 7}) + "\n")
    output = tmp_path / "out"
    arguments = [str(first.path), str(second.path), "--image-root", str(tmp_path / "images")]
    arguments += ["--output", str(output), "--without", str(bad), "--validation-share", "0.2"]
    for _ in range(2):  # the second time everything is there
        assert prepare_data.main(arguments) == 0
    said = capsys.readouterr().out
    assert f"train with --config {output}/train.yaml --config {output}/validation.yaml" in said
    data = load_config(output / "train.yaml", output / "validation.yaml").data
    sections = {"train": data.train, "validation": data.validation}
    lines = {
        section: [json.loads(line) for each in entries for line in read_lines(each.path)]
        for section, entries in sections.items()
    }
    assert len(lines["train"]) + len(lines["validation"]) == 82
    assert 12 <= len(lines["validation"]) <= 17
    shown = {
        section: {image for each in records for image in each.get("image", ["text"])}
        for section, records in lines.items()
    }
    assert not shown["train"] & shown["validation"]
    assert len({each["key"] for records in lines.values() for each in records}) == 82
    assert prepare_data.main([*arguments, "--section", "validation"]) == 2


@pytest.mark.parametrize("layout", ["jsonl", "webdataset"])
def test_images_that_come_with_their_records_are_split_by_their_bytes(
    tmp_path: Path, layout: str
) -> None:
    """And shards are made of both sides."""
    for image in range(10):
        save_image(tmp_path / "images" / f"{image}.png", seed=image)
    (source,) = sources_of(tmp_path, [asked(n, [f"{n // 4}.png"]) for n in range(40)])
    shards = [str(source.path), "--image-root", str(tmp_path / "images"), "--layout", "webdataset"]
    assert prepare_data.main([*shards, "--output", str(tmp_path / "shards")]) == 0
    output = tmp_path / "out"
    arguments = [str(tmp_path / "shards" / "set0"), "--output", str(output), "--layout", layout]
    if layout == "jsonl":
        arguments += ["--images-out", str(tmp_path / "written")]
    assert prepare_data.main([*arguments, "--validation-share", "0.2"]) == 0
    data = load_config(output / "train.yaml", output / "validation.yaml").data
    train, validation = (
        [image_bytes(record) for record in records_of(entry)]
        for entry in (*data.train, *data.validation)
    )
    assert (len(train), len(validation)) == (32, 8)
    assert not set(train) & set(validation)


def records_of(entry: DatasetConfig) -> list[RawRecord]:
    workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
    return list(ValidationRecords([open_dataset(entry)], workers))


def image_bytes(record: RawRecord) -> bytes:
    assert isinstance(record.text, bytes)
    (name,) = json.loads(record.text)["image"]
    return read_image_file(record.image_root, name)
