"""The sample ledger: whole lines, no trace of steps that are done again, and no silent hole."""

import errno
import json
import os
import resource
import shutil
from pathlib import Path
from random import Random
from unittest import mock

import pytest

from megatron_dattn.errors import DataError
from megatron_dattn.runtime.append_file import AppendFile
from megatron_dattn.training.sample_ledger import SampleLedger, drop_later_steps, read_ledger
from tests.support.time_limit import time_limit


def test_lines_reach_the_file_at_once(tmp_path: Path) -> None:
    ledger = SampleLedger(tmp_path / "ledger", 3, resumed_step=0)
    ledger.write(1, [["a", "b"], ["c"]])
    (path,) = (tmp_path / "ledger").iterdir()
    assert path.name == "samples-dp00003.jsonl"
    assert read_ledger(path) == {1: [["a", "b"], ["c"]]}
    ledger.close()


def test_a_resumed_run_drops_the_steps_it_does_again(tmp_path: Path) -> None:
    ledger = SampleLedger(tmp_path, 0, resumed_step=0)
    for step in (1, 2, 3):
        ledger.write(step, [[f"old{step}"]])
    ledger.close()
    path = tmp_path / "samples-dp00000.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "pac')  # a process died here
    resumed = SampleLedger(tmp_path, 0, resumed_step=2)
    resumed.write(3, [["new3"]])
    resumed.close()
    assert read_ledger(path) == {1: [["old1"]], 2: [["old2"]], 3: [["new3"]]}


def path_of(folder: Path) -> Path:
    return folder / "samples-dp00000.jsonl"


def line(step: int) -> str:
    return json.dumps({"step": step, "packs": [[f"key{step}"]]}) + "\n"


def packs(*steps: int) -> dict[int, list[list[str]]]:
    return {step: [[f"key{step}"]] for step in steps}


def resume(folder: Path, step: int) -> dict[int, list[list[str]]]:
    """Open the ledger as a run does that goes on from a step; what it holds then."""
    SampleLedger(folder, 0, resumed_step=step).close()
    return read_ledger(path_of(folder))


@pytest.mark.parametrize(
    ("steps", "missing"),
    [
        ((1, 2, 3), "4-6"),
        ((1, 2, 3, 4, 5), "6"),
        ((1, 4, 6), "2-3, 5"),
        ((4, 5, 6), "1-3"),
        ((1, 2, 9), "3-6"),
        ((), "1-6"),
        (tuple(range(2, 40, 2)), "1, 3, 5"),
    ],
)
def test_steps_that_are_missing_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: tuple[int, ...], missing: str
) -> None:
    path_of(tmp_path).write_text("".join(map(line, steps)))
    assert resume(tmp_path, 6) == packs(*(step for step in steps if step <= 6))
    assert f"lacks steps {missing}, though the checkpoint is of step 6" in caplog.text
    assert not list(tmp_path.glob("*.damaged-*"))


def test_a_ledger_that_does_not_exist_yet_is_told_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert resume(tmp_path, 2) == {}
    assert "lacks steps 1-2" in caplog.text


def test_many_holes_are_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path_of(tmp_path).write_text("".join(map(line, range(2, 1000, 2))))
    resume(tmp_path, 1000)
    assert "13, 15, ..., though" in caplog.text


@pytest.mark.parametrize("left", [1, 10, -1])
def test_a_cut_last_line_of_a_step_that_is_done_is_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, left: int
) -> None:
    path_of(tmp_path).write_text(line(1) + line(2) + line(3)[:left])
    assert resume(tmp_path, 3) == packs(1, 2)
    assert "lacks steps 3," in caplog.text
    assert resume(tmp_path, 2) == packs(1, 2)


def test_a_whole_ledger_is_nothing_to_speak_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path_of(tmp_path).write_text("".join(map(line, (1, 2, 3, 4))))
    assert resume(tmp_path, 3) == packs(1, 2, 3)
    assert not caplog.records


def test_a_rank_that_is_new_had_no_packs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also one that was there, was away, and is there again; a hole before that is told."""
    SampleLedger(tmp_path, 0, resumed_step=2, is_new_rank=True).close()
    assert read_ledger(path_of(tmp_path)) == {1: [], 2: []}
    path_of(tmp_path).write_text("".join(map(line, (1, 2, 3))))
    SampleLedger(tmp_path, 0, resumed_step=2, is_new_rank=True).close()
    assert read_ledger(path_of(tmp_path)) == packs(1, 2)
    SampleLedger(tmp_path, 0, resumed_step=4, is_new_rank=True).close()
    assert read_ledger(path_of(tmp_path)) == {**packs(1, 2), 3: [], 4: []}
    assert not caplog.records
    path_of(tmp_path).write_text("".join(map(line, (1, 3))))
    SampleLedger(tmp_path, 0, resumed_step=4, is_new_rank=True).close()
    assert read_ledger(path_of(tmp_path)) == {**packs(1, 3), 4: []}
    assert "lacks steps 2," in caplog.text


def test_steps_that_are_done_again_leave_the_files_of_ranks_that_are_gone(tmp_path: Path) -> None:
    for rank in range(3):
        ledger = SampleLedger(tmp_path, rank, resumed_step=0)
        for step in (1, 2, 3):
            ledger.write(step, [[f"key{step}"]])
        ledger.close()
    drop_later_steps(tmp_path, num_ranks=1, resumed_step=2)
    held = [sorted(read_ledger(tmp_path / f"samples-dp{rank:05d}.jsonl")) for rank in range(3)]
    assert held == [[1, 2, 3], [1, 2], [1, 2]]


DAMAGED = {
    "zeros in place of lines": "\0" * 300 + "\n",
    "zeros at the end": "\0" * 300,
    "zeros within a line": '{"step": 2, "pa\0\0\0\0',
    "no JSON": "step 2\n",
    "empty line": "\n",
    "list": "[2]\n",
    "no step": '{"packs": [["a"]]}\n',
    "step of another type": '{"step": "2", "packs": [["a"]]}\n',
    "no packs": '{"step": 2}\n',
    "keys of another type": '{"step": 2, "packs": [[2]]}\n',
    "nested": '{"step": 2, "packs": ' + "[" * 5000 + "\n",
    "digits": '{"step": ' + "9" * 5000 + ', "packs": []}\n',
    "again": line(1),
    "backwards": line(0),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_no_line_is_set_aside_with_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    path = path_of(tmp_path)
    content = line(1) + DAMAGED[kind] + (line(3) if DAMAGED[kind].endswith("\n") else "")
    path.write_text(content)
    kept = (1, 3) if DAMAGED[kind].endswith("\n") else (1,)
    assert resume(tmp_path, 3) == packs(*kept)
    (aside,) = tmp_path.glob("samples-dp00000.jsonl.damaged-*")
    assert aside.read_text() == content
    assert "is damaged in line 2 (" in caplog.text
    assert aside.name in caplog.text
    assert f"lacks steps {'2,' if len(kept) == 2 else '2-3,'}" in caplog.text
    caplog.clear()
    assert resume(tmp_path, 1) == packs(1)
    assert not caplog.records


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a device", "link to itself"])
def test_what_is_no_file_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    path = path_of(tmp_path)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "link to a device" else path.name)
    with time_limit(30):
        assert resume(tmp_path, 1) == {}
    assert "is no ledger" in caplog.text
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1


def test_a_ledger_that_the_system_does_not_give_is_an_error(tmp_path: Path) -> None:
    path_of(tmp_path).write_text(line(1))
    failing = mock.patch(
        "megatron_dattn.training.sample_ledger.open_plain",
        side_effect=OSError(errno.EIO, "broken disk"),
    )
    with failing, pytest.raises(OSError, match="broken disk"):
        SampleLedger(tmp_path, 0, resumed_step=1)
    assert [path.name for path in tmp_path.iterdir()] == ["samples-dp00000.jsonl"]
    assert read_ledger(path_of(tmp_path)) == packs(1)


def test_a_damaged_ledger_cannot_be_evaluated(tmp_path: Path) -> None:
    path_of(tmp_path).write_text(line(1) + "\0\n")
    with pytest.raises(DataError, match=r"damaged in line 2"):
        read_ledger(path_of(tmp_path))


def test_random_damage_of_a_ledger_keeps_what_is_sound(tmp_path: Path) -> None:
    """Whatever happens to the bytes, every line that is kept is one that was written."""
    whole = "".join(map(line, range(1, 21))).encode()
    for seed in range(200):
        random = Random(seed)
        data = bytearray(whole)
        for _ in range(random.choice((1, 1, 5))):
            start = random.randrange(len(data))
            end = start + random.choice((1, 1, 40, len(data)))
            kind = random.choice(("flip", "zero", "cut", "repeat"))
            if kind == "flip":
                data[start] ^= 1 << random.randrange(8)
            elif kind == "zero":
                data[start:end] = bytes(len(data[start:end]))
            else:
                data[start:end] = data[start:end] * (2 if kind == "repeat" else 0)
            data = data or bytearray(b"\0")
        path_of(tmp_path).write_bytes(data)
        with mock.patch("os.fsync"):  # hundreds of them
            kept = resume(tmp_path, 20)
        steps = [step for step in kept if kept[step] == [[f"key{step}"]]]
        # A flipped bit may make another key, or another step, of a line.
        assert len(kept) - len(steps) <= 5, seed
        assert list(kept) == sorted(kept), seed


def test_lines_are_on_the_disk_before_the_checkpoint_is(tmp_path: Path) -> None:
    ledger = SampleLedger(tmp_path, 0, resumed_step=0)
    ledger.write(1, [["a"]])
    with mock.patch("os.fsync") as fsync:
        ledger.sync()
    fsync.assert_called_once()
    ledger.close()


def test_a_full_disk_is_kept_in_mind_and_the_line_tried_again(tmp_path: Path) -> None:
    """Half a line may have been taken: nothing of it stays, and no line comes twice."""
    ledger = SampleLedger(tmp_path, 0, resumed_step=0)
    ledger.write(1, [["key1"]])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(line(1)) + 5, hard))
        ledger.write(2, [["key2"]])
        ledger.write(3, [["key3"]])
        assert ledger.failure is not None
        assert "ulimit -f" in ledger.failure
        with pytest.raises(OSError, match="File too large"):
            ledger.sync()
        assert path_of(tmp_path).read_text() == line(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    ledger.write(4, [["key4"]])
    assert ledger.failure is None
    ledger.close()
    assert read_ledger(path_of(tmp_path)) == packs(1, 2, 3, 4)


def test_a_ledger_that_stays_unwritable_can_be_closed(tmp_path: Path) -> None:
    ledger = SampleLedger(tmp_path, 0, resumed_step=0)
    refused = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(AppendFile, "append", side_effect=refused):
        ledger.write(1, [["key1"]])
        ledger.close()
    assert path_of(tmp_path).read_text() == ""


@pytest.mark.parametrize("instead", ["nothing", "folder", "file", "link"])
def test_a_ledger_that_is_deleted_under_a_run_loses_nothing(
    tmp_path: Path, instead: str, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = SampleLedger(tmp_path / "ledger", 0, resumed_step=0)
    path = tmp_path / "ledger" / "samples-dp00000.jsonl"
    ledger.write(1, [["a"]])
    ledger.sync()
    assert not caplog.records
    shutil.rmtree(path.parent)
    if instead != "nothing":
        path.parent.mkdir()
    if instead == "folder":
        path.mkdir()
    elif instead == "file":
        path.write_text("another's")
    elif instead == "link":
        path.symlink_to(tmp_path / "nowhere")
    ledger.write(2, [["b"]])
    ledger.sync()
    ledger.write(3, [["c"]])
    ledger.sync()
    ledger.close()
    assert read_ledger(path) == {1: [["a"]], 2: [["b"]], 3: [["c"]]}
    (line,) = caplog.messages
    assert line.startswith(f"{path} was deleted under this run: it is written again")
    assert ("what was in its place is now" in line) == (instead != "nothing")
    assert len(list(path.parent.iterdir())) == (1 if instead == "nothing" else 2)
