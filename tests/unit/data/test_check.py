"""The check tool finds what the loader would skip."""

import io
import json
import os
import signal
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from megatron_dattn.data.check import RecordChecker, check_records
from megatron_dattn.data.check_report import RecordCheck
from megatron_dattn.data.conversation import parse_record
from megatron_dattn.data.image_files import RecordWithImages
from megatron_dattn.data.json_lines import MAX_LINE_BYTES
from megatron_dattn.data.rejection import Reason
from megatron_dattn.errors import DataError
from tests.unit.data.builders import make_records, record, save_image
from tests.unit.data.test_encoder import tiled
from tests.unit.data.test_loader import bad_records
from tools import check_data, prepare_data


def write(path: Path, records: list[Any]) -> str:
    path.write_text(json.dumps(records))
    return str(path)


def options(processor: Path) -> list[str]:
    return [
        *("--tokenizer", str(processor), "--image-size", "16", "--patch-size", "8"),
        *("--visual-budget", "16", "--text-budget", "256"),
    ]


def test_good_data_passes(
    processor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "data.json", make_records(tmp_path, 20))
    assert check_data.main([path, *options(processor)]) == 0
    assert "20 records" in capsys.readouterr().out


def test_every_problem_is_reported(
    processor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = make_records(tmp_path, 5)
    for value in records[:3]:
        value["id"] = "same"
    bad = bad_records(tmp_path)
    path = write(tmp_path / "data.json", [*records, *bad.values()])
    report_path = tmp_path / "report.json"
    arguments = [path, "--report", str(report_path), *options(processor)]
    assert check_data.main(arguments) == 2
    (report,) = json.loads(report_path.read_text())["files"]
    problems = report["problems"]
    assert set(problems) == {str(reason) for reason in bad}
    assert all(problem["count"] == 1 for problem in problems.values())
    assert problems["missing_image"]["examples"][0]["record"] == "record 11"
    assert report["records"] == 15
    assert report["bad_records"] == 10
    assert report["duplicate_ids"] == 2
    table = capsys.readouterr().out
    for reason in bad:
        assert reason in table


def test_visual_tokens_are_those_of_all_squares(tmp_path: Path) -> None:
    """A wide image has three of four tokens; of several files the first that fails is named."""
    Image.effect_noise((40, 20), 90).save(tmp_path / "wide.png")
    wide, too_wide = (record("<image>" * n + "?", "a", ["wide.png"] * n) for n in (2, 4))
    check = RecordChecker(tmp_path, 10_000, tiled(visual=24))
    assert (check(wide).outcome, check(wide).visual_tokens) == ("used", 24)
    found = check(too_wide)
    assert (found.outcome, found.visual_tokens) == ("skipped", 48)
    assert [each.problem for each in found.findings] == [Reason.TOO_MANY_IMAGES]
    # Cut off behind its header, an image is found broken after others are found missing.
    data = (tmp_path / "wide.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    found = check(record("<image><image>?", "a", ["cut.png", "none.png"]))
    reasons = [each.problem for each in found.findings]
    assert reasons == [Reason.MISSING_IMAGE, Reason.BROKEN_IMAGE]
    assert found.visual_tokens is None


def test_shards_are_checked_as_what_they_were_made_of(tmp_path: Path) -> None:
    records = [record(f"<image>{n % 3} ?", "a", f"{n % 4}.png") for n in range(11)]
    for number in range(4):
        save_image(tmp_path / f"{number}.png", seed=number)
    (tmp_path / "3.png").write_bytes(b"")
    path = write(tmp_path / "data.json", [*records, records[0]])
    output = str(tmp_path / "out")
    assert prepare_data.main([path, "--output", output, "--layout", "webdataset"]) == 0
    figures = []
    for source in (path, f"{output}/data"):
        report = tmp_path / "report.json"
        assert check_data.main([source, "--report", str(report)]) == 2
        (found,) = json.loads(report.read_text())["files"]
        figures.append([found[name] for name in ("skipped", "images", "duplicate_records")])
    assert figures == [[{"empty_image": 2}, 12, 1]] * 2


def test_equal_images_of_other_names_are_counted_and_listed_where_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("a", 0), ("b", 1), ("copy", 0)):
        save_image(tmp_path / f"{name}.png", seed=seed)
    records = [record("<image>?", f"{n}", f"{name}.png") for n, name in enumerate("aab")]
    records.append(record("<image><image>?", "yes", ["b.png", "copy.png"]))
    path, listed = write(tmp_path / "data.json", records), tmp_path / "bad.jsonl"
    report = tmp_path / "report.json"
    outputs = ["--list", str(listed), "--report", str(report)]
    assert check_data.main([path, *outputs, "--list-duplicates"]) == 0
    assert listed.read_text() == ""
    (found,) = json.loads(report.read_text())["files"]
    assert found["duplicate_images"] == 1
    assert found["bad_records"] == 0
    assert found["duplicates"]["duplicate_image"]["examples"] == [
        {"record": "record 3", "message": "as record 0"}
    ]
    assert "1 with an image of an earlier one" in capsys.readouterr().out
    assert check_data.main([path, *outputs, "--list-duplicate-images"]) == 0
    (line,) = map(json.loads, listed.read_text().splitlines())
    assert (line["record"], line["reasons"]) == (3, ["duplicate_image"])


def test_missing_images_can_be_accepted(tmp_path: Path) -> None:
    records = [*make_records(tmp_path, 5), record("<image>", "y", "none.png")]
    path = write(tmp_path / "data.json", records)
    assert check_data.main([path]) == 2
    assert check_data.main([path, "--missing", "skip"]) == 0
    path = write(tmp_path / "data.json", [*records, record("x", "")])
    assert check_data.main([path, "--missing", "skip"]) == 2


def test_one_record_can_have_several_problems(processor: Path, tmp_path: Path) -> None:
    records = [record("<image><image>" + "a red square " * 400, "y", ["none.png", "gone.png"])]
    report_path = tmp_path / "report.json"
    path = write(tmp_path / "data.json", records)
    assert check_data.main([path, "--report", str(report_path), *options(processor)]) == 2
    (report,) = json.loads(report_path.read_text())["files"]
    counts = {reason: problem["count"] for reason, problem in report["problems"].items()}
    assert counts == {"missing_image": 2, "too_much_text": 1}
    assert report["bad_records"] == 1


def test_an_unreadable_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_data.main([str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_report_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "data.json", make_records(tmp_path, 1))
    assert check_data.main([path, "--report", str(tmp_path / "none" / "report.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_images_are_counted_as_the_loader_reads_them(tmp_path: Path) -> None:
    records = [*make_records(tmp_path, 4), {**record("q", "a"), "image": ""}, {"image": 3}]
    path, report_path = write(tmp_path / "data.json", records), tmp_path / "report.json"
    check_data.main([path, "--report", str(report_path)])
    (report,) = json.loads(report_path.read_text())["files"]
    assert report["images"] == sum(len(parse_record(value).images) for value in records[:5])


def test_names_that_are_no_text_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's name may hold any bytes, and JSON any halves of surrogate pairs."""
    records = [record("<image>", "a", "../\ud800.png"), {**record("q", "a"), "id": "\ud800"}]
    path = write(tmp_path / os.fsdecode(b"d\xff.json"), records)
    written = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr("sys.stdout", written)
    assert check_data.main([path, "--report", str(tmp_path / "report.json")]) == 2
    assert prepare_data.main([path, "--output", str(tmp_path / "out"), "--drop-missing"]) == 0
    written.seek(0)
    text = written.read()
    assert "d\\udcff.json: 2 records, 1 images, 1 records with problems" in text
    assert "d\\udcff.json: 1 records -> " in text
    assert "missing_image" in text
    listed = (tmp_path / "out" / os.fsdecode(b"d\xff.missing.txt")).read_text()
    assert listed == '0\t"../\\ud800.png"\n'


def test_records_too_long_to_be_read_are_reported(tmp_path: Path) -> None:
    long = {**record("q", "a"), "picture": "A" * MAX_LINE_BYTES}
    (found,) = RecordChecker(tmp_path, 100)(long).findings
    assert found.problem == Reason.BAD_RECORD
    assert f"at most {MAX_LINE_BYTES}" in found.message


def test_an_image_of_many_damaged_notes_is_no_flood_of_warnings(tmp_path: Path) -> None:
    entries = b"".join(struct.pack(">HHII", tag, 7, 200, 0) for tag in range(1000, 1200))
    exif = b"MM\0*" + struct.pack(">IH", 8, 200) + entries + bytes(4)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif)
    path = write(tmp_path / "data.json", [record("<image>", "y", "a.jpg")])
    with warnings.catch_warnings(record=True) as caught:
        assert check_data.main([path]) == 0
    assert caught == []


def test_many_records_are_checked_by_processes(
    processor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They find what threads find, in the same order."""
    records = [*make_records(tmp_path, 60), *bad_records(tmp_path).values()]
    for value in records[:5]:
        value["id"] = "same"
    path = write(tmp_path / "data.json", records)
    reports, lists = [], []
    for limit in (2**30, 0):
        monkeypatch.setattr(check_data, "_BYTES_FOR_PROCESSES", limit)
        report, listed = tmp_path / f"report-{limit}.json", tmp_path / f"bad-{limit}.jsonl"
        outputs = ["--report", str(report), "--list", str(listed), "--workers", "2"]
        assert check_data.main([path, *outputs, *options(processor)]) == 2
        reports.append(json.loads(report.read_text()))
        lists.append(listed.read_text())
    assert reports[0] == reports[1]
    assert reports[0]["files"][0]["duplicate_ids"] == 4
    assert lists[0] == lists[1]
    assert lists[0].count("\n") == 10


def test_the_settings_and_data_sets_of_a_run(
    processor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [*make_records(tmp_path, 3), record("a red square " * 30, "y")]
    source = write(tmp_path / "data.json", records)
    assert prepare_data.main([source, "--output", str(tmp_path / "prepared")]) == 0
    model, data = tmp_path / "model.yaml", tmp_path / "data.yaml"
    model.write_text(yaml.safe_dump({"model": {"vision": {"image_size": 16, "patch_size": 8}}}))
    settings = {"tokenizer": str(processor), "visual_budget": 16, "text_budget": 64}
    data.write_text(yaml.safe_dump({"data": settings}))
    configs = [f"--config={path}" for path in (model, data, tmp_path / "prepared" / "train.yaml")]
    capsys.readouterr()
    assert check_data.main(configs) == 2
    said = capsys.readouterr().out
    assert "data.jsonl: 4 records" in said
    assert "too_much_text" in said
    assert "data.text_budget 64" in said
    assert check_data.main([*configs, "--text-budget", "512"]) == 0
    assert check_data.main([*configs, "--image-size", "16"]) == 2
    assert "are the model's" in capsys.readouterr().err
    assert check_data.main([]) == 2
    assert "name files to check" in capsys.readouterr().err


class Killed(RecordChecker):
    """Checks as a process does that the system kills."""

    def __call__(self, record: Any) -> RecordCheck:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_process_that_is_killed_is_one_line(tmp_path: Path) -> None:
    checks = check_records([1], Killed(tmp_path, 100), path="x", processes=True)
    with pytest.raises(DataError, match=r"was killed.*lower --workers"):
        list(checks)


def test_few_records_with_images_are_held_at_a_time(tmp_path: Path) -> None:
    drawn = 0

    def records(image: dict[str, bytes]) -> Iterator[Any]:
        nonlocal drawn
        for number in range(200):
            drawn += 1
            yield RecordWithImages(record("what ?", f"{number}"), image) if image else number

    next(check_records(records({"0.jpg": b"bytes"}), RecordChecker(tmp_path, 100), path="x"))
    assert drawn == 32
    drawn = 0
    next(check_records(records({}), RecordChecker(tmp_path, 100), path="x"))
    assert drawn == 200
