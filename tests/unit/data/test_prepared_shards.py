"""Shards: the same whatever made them, gone on with where a run was stopped, and Energon's own."""

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from megatron.energon.tools import info, lint

from megatron_dattn.config.cli import load_config
from megatron_dattn.data import prepared_shards
from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.data.prepared_shards import ShardSize
from megatron_dattn.data.shard_reader import ShardRows
from megatron_dattn.data.shards import open_shards
from megatron_dattn.errors import CheckpointError
from tests.support.time_limit import time_limit
from tests.unit.data.builders import (
    data_config,
    make_dataset,
    make_loader,
    make_records,
    make_shards,
    record,
    save_image,
)
from tests.unit.data.test_loader import assert_equal, bad_records, take
from tools import prepare_data

RECORDS = 23


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "lla.va.json"
    records = make_records(path.parent, RECORDS)
    for value in records:
        value["id"] = "a.b/c"  # not unique, and no key of a tar
    path.write_text(json.dumps(records))
    return path


def prepare(source: Path, output: Path, *more: str) -> int:
    arguments = ["--layout", "webdataset", "--shard-records", "5", "--output", str(output)]
    return prepare_data.main([str(source), *arguments, *more])


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def members(folder: Path) -> list[list[str]]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found.append(tar.getnames())
    return found


def test_shards_do_not_depend_on_the_processes(source: Path, tmp_path: Path) -> None:
    for workers in ("1", "2"):
        assert prepare(source, tmp_path / workers, "--workers", workers) == 0
    folders = [tmp_path / workers / "lla.va" for workers in ("1", "2")]
    assert list(tars(folders[0])) == [f"shard_0000{n}.tar" for n in range(5)]
    assert tars(folders[0]) == tars(folders[1])
    indexes = [[p.read_bytes() for p in sorted(f.glob("*.idx"))] for f in folders]
    assert indexes[0] == indexes[1]
    assert not list(tmp_path.glob("**/*.part"))


def test_a_tar_holds_text_and_the_files_as_they_are(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "lla.va"
    assert prepare(source, tmp_path / "out") == 0
    assert members(folder)[0][:3] == [
        "lla_va-000000000.json",
        "lla_va-000000000.0.png",
        "lla_va-000000001.json",
    ]
    assert members(folder)[1][2:] == [
        *("lla_va-000000006.json", "lla_va-000000006.0.png", "lla_va-000000006.1.png"),
        *("lla_va-000000007.json", "lla_va-000000007.0.png"),
        *("lla_va-000000008.json", "lla_va-000000008.0.png", "lla_va-000000009.json"),
    ]
    with tarfile.open(folder / "shard_00000.tar") as tar:
        member = tar.extractfile("lla_va-000000001.0.png")
        assert member is not None
        assert member.read() == (source.parent / "images" / "1.png").read_bytes()


def test_energons_tools_accept_the_folder(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As texts: Energon 7.4.1's tools know no crude data sets, which its own `prepare` makes."""
    assert prepare(source, tmp_path / "out") == 0
    folder = str(tmp_path / "out" / "lla.va")
    options = [folder, "--dataset-config", "texts.yaml"]
    info.command.main(options, standalone_mode=False)
    assert f"({RECORDS} samples" in (said := capsys.readouterr().out)
    assert f"`train`: 100%, {RECORDS} samples in 5 shards" in said
    lint.command.main([*options, "--parallel", "0"], standalone_mode=False)
    assert "Skipping empty split part val" in capsys.readouterr().out


@pytest.mark.parametrize("training", [True, False])
def test_both_layouts_give_the_same_samples(
    tmp_path: Path, processor: Path, training: bool
) -> None:
    """The same packs in the same order; the same records are not used, for the same reasons."""
    records = [*make_records(tmp_path, RECORDS), *bad_records(tmp_path).values()]
    config = data_config(processor, max_skipped_fraction=1.0)
    lines = make_dataset(tmp_path, records, "set")
    shards = make_shards(tmp_path, records, "set", size=4)
    loaders = [make_loader(config, [data], training=training) for data in (lines, shards)]
    one, other = (take(loader, 12 if training else 10_000) for loader in loaders)
    for batch in (*one, *other):  # JSON lines that were written by hand have no keys
        batch.sample_keys[:] = [key.rpartition("-")[2] for key in batch.sample_keys]
    assert_equal(one, other)
    assert loaders[0].counters() == loaders[1].counters()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resume_goes_on_with_the_next_batch(
    tmp_path: Path, processor: Path, num_workers: int
) -> None:
    records = make_records(tmp_path, RECORDS)
    config = data_config(processor, num_workers=num_workers)
    shards = make_shards(tmp_path, records, "first", size=4)
    whole = make_loader(config, [shards])
    take(whole, 5)
    state = whole.save_state()
    resumed = make_loader(config, [shards])
    resumed.restore_state(state)
    assert_equal(take(resumed, 6), take(whole, 6))
    records[0]["conversations"][1]["value"] = "another answer, which is longer " * 40
    other = make_loader(config, [make_shards(tmp_path, records, "second", size=4)])
    with pytest.raises(CheckpointError, match="other data sets"):
        other.restore_state(state)


def test_nothing_is_done_twice(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(source, tmp_path / "out") == 0
    folder, first = tmp_path / "out" / "lla.va", capsys.readouterr()
    assert "nothing has changed" not in first.err
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert prepare(source, tmp_path / "out") == 0
    second = capsys.readouterr()
    assert second.out == first.out
    assert "nothing has changed" in second.err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


def _stop_after(count: int) -> Callable[[Any], Any]:
    write, done = prepared_shards._write_shard, []

    def stop(shard: Any) -> Any:
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(shard)
        return write(shard)

    return stop


def test_a_run_that_was_stopped_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare(source, tmp_path / "whole") == 0
    with monkeypatch.context() as patched:
        patched.setattr(prepared_shards, "_write_shard", _stop_after(2))
        assert prepare(source, tmp_path / "out") == 130
    folder = tmp_path / "out" / "lla.va"
    assert list(tars(folder)) == ["shard_00000.tar", "shard_00001.tar"]
    assert not (tmp_path / "out" / "train.yaml").exists()
    (folder / "shard_00002.tar.part").write_bytes(b"x")  # as a kill leaves it
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    assert prepare(source, tmp_path / "out") == 0
    assert tars(folder) == tars(tmp_path / "whole" / "lla.va")
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert not list(folder.glob("*.part"))


def test_a_killed_run_leaves_no_process_and_goes_on(source: Path, tmp_path: Path) -> None:
    """By SIGKILL, while its two processes write."""
    for number in range(8):
        path = source.parent / "images" / f"{number}.png"
        path.write_bytes(path.read_bytes() + bytes(2**20))
    records = json.loads(source.read_text()) * 40
    source.write_text(json.dumps(records))
    words = [str(source), "--layout", "webdataset", "--shard-records", "20", "--output"]
    command = [sys.executable, prepare_data.__file__, *words, str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path(prepare_data.__file__).parents[1])}
    run = subprocess.Popen([*command, "--workers", "2"], env=environment)
    folder = tmp_path / "out" / "lla.va"
    with time_limit(60):
        while len(list(folder.glob("*.tar"))) < 2 and run.poll() is None:
            time.sleep(0.01)
    children = psutil.Process(run.pid).children()
    run.kill()
    run.wait()
    assert psutil.wait_procs(children, timeout=20)[1] == []
    done = len(tars(folder))
    assert 2 <= done < len(records) // 20
    assert prepare_data.main([*words, str(tmp_path / "out"), "--workers", "2"]) == 0
    assert prepare_data.main([*words, str(tmp_path / "whole")]) == 0
    assert tars(folder) == tars(tmp_path / "whole" / "lla.va")
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("damage", ["missing", "cut", "no index"])
def test_what_was_lost_is_made_again(source: Path, tmp_path: Path, damage: str) -> None:
    assert prepare(source, tmp_path / "out") == 0
    folder = tmp_path / "out" / "lla.va"
    before = tars(folder)
    path = folder / "shard_00003.tar"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, 3000)
    else:
        (folder / ".nv-meta" / ".info.json").unlink()
    assert prepare(source, tmp_path / "out") == 0
    assert tars(folder) == before
    assert open_shards(folder).num_records == RECORDS


def test_a_changed_source_is_an_error_that_names_it(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(source, tmp_path / "out") == 0
    before = tars(tmp_path / "out" / "lla.va")
    source.write_text(json.dumps([record("q", "a")]))
    capsys.readouterr()
    assert prepare(source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for words in (f"'{source}' was changed since", "remove", "another --output"):
        assert words in error
    assert tars(tmp_path / "out" / "lla.va") == before


def test_shards_end_by_their_size(source: Path, tmp_path: Path) -> None:
    records = json.loads(source.read_text())
    for number in range(4):
        save_image(source.parent / "images" / f"large{number}.png", seed=number, side=500)
        records[5 * number] = record("<image>", "a", f"images/large{number}.png")
    source.write_text(json.dumps(records))
    arguments = ["--layout", "webdataset", "--shard-megabytes", "1", "--output", str(tmp_path)]
    assert prepare_data.main([str(source), *arguments]) == 0
    sizes = [len(data) for data in tars(tmp_path / "lla.va").values()]
    assert len(sizes) == 4
    assert max(sizes) <= 2**20 + 10240  # tar's own end
    assert open_shards(tmp_path / "lla.va").num_records == RECORDS


def test_missing_images_are_left_out_or_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads(source.read_text())
    records[0]["image"], records[6]["image"][1] = "none.png", "0.png"
    source.write_text(json.dumps(records))
    assert prepare(source, tmp_path / "out") == 0
    assert "2 images are not there: --drop-missing" in capsys.readouterr().out
    rows = dict(ShardRows(open_shards(tmp_path / "out" / "lla.va")).rows([0, 6]))
    assert rows[0]["image"] == "./none.png"
    assert rows[6]["image"] == ["0.png", "./0.png"]
    assert prepare(source, tmp_path / "dropped", "--drop-missing") == 0
    assert "2 without their images left out" in capsys.readouterr().out
    listed = (tmp_path / "dropped" / "lla.va" / "missing.txt").read_text()
    assert listed == '0\t"none.png"\n6\t"0.png"\n'
    save_image(source.parent / "none.png", seed=1)  # it has come
    assert prepare(source, tmp_path / "dropped", "--drop-missing") == 0
    folder = tmp_path / "dropped" / "lla.va"
    assert [sum(name.endswith("json") for name in some) for some in members(folder)] == [5] * 4 + [
        2
    ]


def test_train_and_validation_share_a_folder(source: Path, tmp_path: Path) -> None:
    other = source.with_name("held.out.json")
    other.write_text(json.dumps(make_records(source.parent, 4)))
    assert prepare(source, tmp_path / "out") == 0
    assert prepare(other, tmp_path / "out", "--section", "validation") == 0
    files = [tmp_path / "out" / f"{name}.yaml" for name in ("train", "validation")]
    data = load_config(*files).data
    paths = [str(tmp_path / "out" / name) for name in ("lla.va", "held.out")]
    assert [*data.train, *data.validation] == [DatasetConfig(path) for path in paths]


def test_a_name_of_any_length_makes_keys_that_fit(tmp_path: Path) -> None:
    name = "\u00e9.x" * 60
    data = make_shards(tmp_path, make_records(tmp_path, 2), name)
    assert open_shards(Path(data.path)).num_records == 2


def test_options_of_one_layout_are_refused_for_the_other(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare_data.main([str(source), "--output", str(tmp_path), "--shard-records", "3"]) == 2
    assert "need --layout webdataset" in capsys.readouterr().err
    assert prepare(source, tmp_path / "out", "--images-out", str(tmp_path / "images")) == 2
    assert "go into the shards" in capsys.readouterr().err
    lines = ["--output", str(tmp_path / "lines")]
    assert prepare_data.main([str(source), *lines, "--images-out", str(tmp_path / "images")]) == 2
    assert "stay where they are" in capsys.readouterr().err
    assert prepare(source, tmp_path / "out") == 0
    capsys.readouterr()
    assert prepare_data.main([str(tmp_path / "out" / "lla.va"), *lines]) == 2
    assert "--images-out, or take --layout webdataset" in capsys.readouterr().err
    assert not (tmp_path / "lines").exists()


def test_a_worker_that_is_killed_is_one_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures.process import BrokenProcessPool

    from megatron_dattn.errors import DataError

    class Broken:
        def __init__(self, *_: object, **__: object) -> None: ...
        def submit(self, *_: object) -> None:
            raise BrokenProcessPool("a child process terminated abruptly")

        def shutdown(self, **_: object) -> None: ...

    monkeypatch.setattr(prepared_shards, "ProcessPoolExecutor", Broken)
    shard = prepared_shards._Shard(tmp_path / "a.tar", "a", str(tmp_path), None, [])
    with pytest.raises(DataError, match="lower --workers"):
        list(prepared_shards._written([shard], 2))


def test_the_size_of_a_shard_by_default() -> None:
    assert ShardSize() == ShardSize(prepare_data._SHARD_RECORDS)
