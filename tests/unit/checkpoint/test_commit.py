"""A save that dies or fails at any point leaves the older checkpoint loadable and the latest."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_dattn.checkpoint import commit, files, find_checkpoint, prune, save_checkpoint, writer
from megatron_dattn.checkpoint.manifest import read_manifest, write_manifest
from megatron_dattn.errors import CheckpointError
from tests.support.distributed import RankError, run_distributed
from tests.unit.checkpoint.conftest import FACTS, small_state


class Death(BaseException):
    """Stands for SIGKILL: no handler of the code under test may catch it."""


def before(owner: Any, name: str) -> mock._patch:
    return mock.patch.object(owner, name, side_effect=Death)


def after(owner: Any, name: str) -> mock._patch:
    original = getattr(owner, name)

    def work_and_die(*args: Any, **options: Any) -> None:
        original(*args, **options)
        raise Death

    return mock.patch.object(owner, name, work_and_die)


# Every step of the protocol, in order, and whether the new checkpoint exists when dying there.
POINTS = [
    (before, commit, "_make_temporary", False),
    (after, commit, "_make_temporary", False),
    (before, writer, "_write_common", False),
    (after, writer, "_write_common", False),
    (before, writer.ShardWriter, "write_data", False),
    (after, writer.ShardWriter, "write_data", False),
    (before, writer.ShardWriter, "finish", False),
    (after, writer.ShardWriter, "finish", False),
    (before, writer, "_write_marker", False),
    (after, writer, "_write_marker", False),
    (after, commit, "_write_extra", False),
    (after, commit, "_hash_own", False),
    (before, commit, "write_manifest", False),
    (after, commit, "write_manifest", False),
    (before, commit, "_commit", False),
    (after, commit, "_commit", True),
    (before, commit, "_publish", True),
    (before, files.os, "replace", True),
    (after, commit, "_publish", True),
]


@pytest.mark.parametrize(
    ("when", "owner", "name", "committed"),
    POINTS,
    ids=[f"{when.__name__} {name}" for when, _, name, _ in POINTS],
)
def test_death_at_any_point(
    tmp_path: Path,
    save: Callable[[int], Path],
    when: Callable[..., mock._patch],
    owner: Any,
    name: str,
    committed: bool,
) -> None:
    save(1)
    with when(owner, name), pytest.raises(Death):
        save(2)
    found = find_checkpoint(tmp_path)
    assert found.step == (2 if committed else 1)
    assert found.passed_over == ()
    assert save(3).name == "step-0000003"
    kept = {"step-0000001", "step-0000003", "latest.json"} | (
        {"step-0000002"} if committed else set()
    )
    assert {entry.name for entry in tmp_path.iterdir()} == kept
    assert json.loads((tmp_path / "latest.json").read_text())["step"] == 3


def be_killed(folder: str, owner: str, name: str) -> None:
    """A real SIGKILL in the middle of a save."""
    from tests.support.megatron import init_model_parallel

    init_model_parallel()
    save_checkpoint(folder, 1, small_state(1.0), facts=FACTS)
    module = {"writer": writer, "files": files, "commit": commit}[owner]

    def kill_this_process(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(module, name, kill_this_process):
        save_checkpoint(folder, 2, small_state(2.0), facts=FACTS)


@pytest.mark.parametrize(
    ("owner", "name", "step"), [("writer", "_write_marker", 1), ("commit", "_publish", 2)]
)
def test_a_killed_process(tmp_path: Path, owner: str, name: str, step: int) -> None:
    with pytest.raises(RankError, match="exit code -9"):
        run_distributed(be_killed, 1, str(tmp_path), owner, name)
    assert find_checkpoint(tmp_path).step == step
    leftovers = [entry for entry in tmp_path.iterdir() if files.is_temporary(entry.name)]
    assert len(leftovers) == (1 if step == 1 else 0)
    save_checkpoint(tmp_path, 3, small_state(3.0), facts=FACTS)
    assert not [entry for entry in tmp_path.iterdir() if files.is_temporary(entry.name)]


def test_what_is_saved_and_where(tmp_path: Path, save: Callable[[int], Path]) -> None:
    folder = save(12)
    assert folder == tmp_path / "step-0000012"
    assert json.loads((tmp_path / "latest.json").read_text()) == {
        "checkpoint": "step-0000012",
        "step": 12,
    }
    manifest = read_manifest(folder)
    assert manifest.step == 12
    assert manifest.facts["stage"] == "stage1"
    assert manifest.layout == {"world": 1, "tensor": 1, "pipeline": 1, "context": 1, "data": 1}
    assert (folder / "loader-dp-00000.bin").read_bytes() == b"place 12"


def test_megatron_core_reads_it(save: Callable[[int], Path]) -> None:
    loaded = dist_checkpointing.load(small_state(), str(save(5)))
    assert torch.equal(loaded["model"]["body.weight"], torch.full((4, 3), 5.0))
    assert loaded["object"] == {"value": 5.0}
    assert loaded["schedule"] == {"num_steps": 5}


def test_nothing_is_written_by_another_process(save: Callable[[int], Path]) -> None:
    with mock.patch("os.fork", side_effect=AssertionError("a child process")):
        save(1)


def test_the_same_step_is_never_overwritten(tmp_path: Path, save: Callable[[int], Path]) -> None:
    folder = save(1)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(CheckpointError, match="exists and is never overwritten"):
        save(1)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["latest.json", "step-0000001"]


def test_a_damaged_checkpoint_of_the_same_step_steps_aside(
    tmp_path: Path, save: Callable[[int], Path], caplog: pytest.LogCaptureFixture
) -> None:
    (save(1) / "common.pt").write_bytes(b"")
    save(1)
    assert find_checkpoint(tmp_path).step == 1
    (aside,) = [entry for entry in tmp_path.iterdir() if ".damaged-" in entry.name]
    assert (aside / "common.pt").stat().st_size == 0
    assert "common.pt is damaged" in caplog.text
    assert str(aside) in caplog.text


def test_a_folder_that_appears_during_the_save_is_not_replaced(
    tmp_path: Path, save: Callable[[int], Path]
) -> None:
    def write_and_be_overtaken(*args: Any) -> None:
        write_manifest(*args)
        (tmp_path / "step-0000001").mkdir()

    with (
        mock.patch.object(commit, "write_manifest", write_and_be_overtaken),
        pytest.raises(CheckpointError, match="two jobs"),
    ):
        save(1)
    assert os.listdir(tmp_path / "step-0000001") == []


def test_too_little_space_is_seen_before_anything_is_written(
    tmp_path: Path, save: Callable[[int], Path]
) -> None:
    save(1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with (
        mock.patch("shutil.disk_usage", return_value=usage),
        mock.patch.object(commit, "_make_temporary", side_effect=AssertionError),
        pytest.raises(
            CheckpointError, match=r"disk full: a checkpoint needs .* GiB, .* has 0\.000"
        ),
    ):
        save(2)
    assert find_checkpoint(tmp_path).step == 1


def test_an_unwritable_pointer_does_not_lose_the_checkpoint(
    tmp_path: Path, save: Callable[[int], Path], caplog: pytest.LogCaptureFixture
) -> None:
    save(1)
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch.object(files, "replace_synced", side_effect=full):
        save(2)
    assert "latest.json is not updated" in caplog.text
    assert find_checkpoint(tmp_path).step == 2


@pytest.mark.parametrize("name", ["../a.bin", "manifest.json", "common.pt", "a/b.bin", "", ".x.y"])
def test_names_of_extra_files_are_checked(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="extra file"):
        save_checkpoint(tmp_path, 1, small_state(), facts=FACTS, extra_files={name: b""})


def test_only_left_overs_of_dead_writers_are_removed(
    tmp_path: Path, save: Callable[[int], Path]
) -> None:
    host = files._host()
    parent_runs = tmp_path / f"step-0000004.tmp-{os.getppid()}-0123456789ab-{host}"
    elsewhere_now = tmp_path / "step-0000005.tmp-4-0123456789ab-another.host"
    elsewhere_old = tmp_path / "step-0000006.tmp-4-0123456789ab-another.host"
    own = tmp_path / f"step-0000007.tmp-{os.getpid()}-0123456789ab-{host}"
    trash = tmp_path / ".trash-0123456789ab-step-0000001"
    others = tmp_path / "step-0000008.tmp-notes"
    for folder in (parent_runs, elsewhere_now, elsewhere_old, own, trash, others):
        folder.mkdir()
        (folder / "__0_0.distcp").write_bytes(b"x")
    for path in (elsewhere_old / "__0_0.distcp", elsewhere_old):
        os.utime(path, (1e9, 1e9))
    save(9)
    assert [f.exists() for f in (parent_runs, elsewhere_now, others)] == [True] * 3
    assert [f.exists() for f in (elsewhere_old, own, trash)] == [False] * 3


def test_the_newest_stay(tmp_path: Path, save: Callable[[int], Path]) -> None:
    for step in (1, 2, 3, 4, 5):
        save(step)
    assert [path.name for path in prune(tmp_path, 3)] == ["step-0000002", "step-0000001"]
    assert [path.name for path in prune(tmp_path, 0)] == ["step-0000003"]
    assert sorted(os.listdir(tmp_path)) == ["latest.json", "step-0000004", "step-0000005"]


def test_a_damaged_checkpoint_does_not_count_as_kept(
    tmp_path: Path, save: Callable[[int], Path]
) -> None:
    for step in (1, 2, 3, 4):
        save(step)
    (tmp_path / "step-0000003" / "__0_0.distcp").unlink()
    assert [path.name for path in prune(tmp_path, 2)] == ["step-0000001"]
    assert find_checkpoint(tmp_path).step == 4


def test_death_while_deleting_leaves_no_half_checkpoint(
    tmp_path: Path, save: Callable[[int], Path]
) -> None:
    for step in (1, 2, 3):
        save(step)
    with mock.patch("shutil.rmtree", side_effect=Death), pytest.raises(Death):
        prune(tmp_path, 2)
    assert find_checkpoint(tmp_path).step == 3
    assert not (tmp_path / "step-0000001").exists()
    save(4)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".trash")]
