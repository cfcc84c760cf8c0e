"""A checkpoint is of the step that its manifest says: its folder's name is never believed over it.

Folders are exchanged, copied, linked and renamed by people who tidy up. What is then misnamed is
told with the remedy and left alone; training goes on from the newest sound one, and nothing is
deleted.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dattn.checkpoint import (
    find_checkpoint,
    find_checkpoint_together,
    find_step,
    load_checkpoint,
    prune,
    steps_of,
    verify,
)
from megatron_dattn.checkpoint.manifest import MisnamedError, read_manifest
from megatron_dattn.checkpoint.tensors import open_tensors
from megatron_dattn.errors import CheckpointError
from tests.unit.checkpoint.conftest import small_state
from tests.unit.checkpoint.test_manifest import DAMAGES, damage

Save = Callable[[int], Path]
Fill = Callable[..., None]


@pytest.fixture(params=[find_checkpoint, find_checkpoint_together], ids=["alone", "together"])
def find(request: pytest.FixtureRequest) -> Callable:
    return request.param


def place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:07d}"


def rename(folder: Path, source: int, target: int) -> None:
    place(folder, source).rename(place(folder, target))


def copy(folder: Path, source: int, target: int) -> None:
    shutil.copytree(place(folder, source), place(folder, target))


def copy_by_hard_links(folder: Path, source: int, target: int) -> None:
    shutil.copytree(place(folder, source), place(folder, target), copy_function=os.link)


def link(folder: Path, source: int, target: int) -> None:
    place(folder, target).symlink_to(place(folder, source).name)


def exchange(folder: Path, source: int, target: int) -> None:
    place(folder, target).rename(folder / "aside")
    rename(folder, source, target)
    (folder / "aside").rename(place(folder, source))


WAYS = [rename, copy, copy_by_hard_links, link]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("source", [1, 2])
def test_a_folder_under_a_higher_number_is_passed_over_with_the_remedy(
    tmp_path: Path,
    fill: Fill,
    find: Callable,
    caplog: pytest.LogCaptureFixture,
    way: Callable,
    source: int,
) -> None:
    fill(1, 2, 3)
    way(tmp_path, source, 99)
    found = find(tmp_path)
    assert (found.step, found.path) == (3, place(tmp_path, 3))
    (reason,) = found.passed_over
    assert f"named after step 99, but holds the checkpoint of step {source}" in reason
    assert f"rename it to step-000000{source}" in caplog.text
    assert "GOING BACK to" in caplog.text


@pytest.mark.parametrize("way", WAYS)
def test_the_newest_of_all_under_another_number(
    tmp_path: Path, fill: Fill, find: Callable, way: Callable
) -> None:
    fill(1, 2)
    way(tmp_path, 2, 99)
    assert find(tmp_path).step == (1 if way is rename else 2)
    assert read_manifest(place(tmp_path, 99), any_name=True).step == 2


def test_exchanged_folders_are_both_passed_over(
    tmp_path: Path, fill: Fill, find: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    fill(1, 2, 3)
    exchange(tmp_path, 2, 3)
    found = find(tmp_path)
    assert found.step == 1
    assert len(found.passed_over) == 2
    assert "rename it to step-0000002" in caplog.text
    assert "rename it to step-0000003" in caplog.text


def test_if_all_are_misnamed_the_run_does_not_start_afresh(
    tmp_path: Path, fill: Fill, find: Callable
) -> None:
    fill(1, 2)
    exchange(tmp_path, 1, 2)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is usable .*rename it to"):
        find(tmp_path)


def test_a_misnamed_folder_is_never_read_by_any_way(tmp_path: Path, fill: Fill) -> None:
    fill(1)
    rename(tmp_path, 1, 7)
    folder = place(tmp_path, 7)
    for use in (
        verify,
        read_manifest,
        open_tensors,
        find_checkpoint,
        lambda path: find_step(path.parent, 7),
        lambda path: load_checkpoint(path, small_state()),
    ):
        with pytest.raises(CheckpointError, match=r"named after step 7, but holds .* step 1"):
            use(folder)
    with pytest.raises(MisnamedError):
        verify(folder)


def test_a_step_that_is_asked_for_is_the_right_one_or_none(tmp_path: Path, fill: Fill) -> None:
    fill(1, 2)
    rename(tmp_path, 2, 9)
    assert steps_of(tmp_path) == [1]
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 2; steps: 1; .*step-0000009"):
        find_step(tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"named after step 9, but holds .* step 2"):
        find_step(tmp_path, 9)


def test_the_name_of_a_folder_in_which_we_stand(
    tmp_path: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(1)
    monkeypatch.chdir(place(tmp_path, 1))
    assert find_checkpoint(".").step == 1
    monkeypatch.chdir(tmp_path)
    rename(tmp_path, 1, 2)
    monkeypatch.chdir(place(tmp_path, 2))
    with pytest.raises(CheckpointError, match="named after step 2"):
        find_checkpoint(".")


def test_a_folder_of_a_free_name_is_what_its_manifest_says(tmp_path: Path, fill: Fill) -> None:
    fill(1)
    copied = shutil.copytree(place(tmp_path, 1), tmp_path / "elsewhere" / "best")
    assert find_checkpoint(copied).step == 1


@pytest.mark.parametrize("name", ["step-00000002", "step-2", "best", "step-000000٢"])
def test_a_newer_one_without_a_steps_name_is_mentioned(
    tmp_path: Path, fill: Fill, find: Callable, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    fill(1, 2)
    place(tmp_path, 2).rename(tmp_path / name)
    (tmp_path / "latest.json").unlink()
    assert find(tmp_path).step == 1
    assert f"NOT TAKEN: {tmp_path / name} holds step 2: rename it to step-0000002" in caplog.text


def test_the_only_one_without_a_steps_name_is_no_fresh_start(
    tmp_path: Path, fill: Fill, find: Callable
) -> None:
    fill(1)
    place(tmp_path, 1).rename(tmp_path / "best")
    (tmp_path / "latest.json").unlink()
    with pytest.raises(CheckpointError, match="best holds step 1: rename it to step-0000001"):
        find(tmp_path)


def test_a_stray_manifest_does_not_hide_the_checkpoints(
    tmp_path: Path, fill: Fill, find: Callable
) -> None:
    fill(1)
    shutil.copy(place(tmp_path, 1) / "manifest.json", tmp_path)
    assert find(tmp_path).step == 1


def test_a_renamed_newest_is_not_pruned_and_neither_is_what_stays(
    tmp_path: Path, save: Save, fill: Fill, caplog: pytest.LogCaptureFixture
) -> None:
    fill(1, 2, 3)
    rename(tmp_path, 3, 99)
    assert prune(tmp_path, 2) == []
    assert find_checkpoint(tmp_path).step == 2
    save(4)
    assert [path.name for path in prune(tmp_path, 2)] == ["step-0000001"]
    assert place(tmp_path, 99).is_dir()
    assert "not counted among the kept checkpoints" in caplog.text


def test_pruning_spares_whose_identity_is_unsure(tmp_path: Path, fill: Fill) -> None:
    fill(1, 2, 3, 4, 5)
    (place(tmp_path, 1) / "manifest.json").write_bytes(b"\0" * 100)
    rename(tmp_path, 2, 0)
    elsewhere = tmp_path / "other-disk"
    place(tmp_path, 3).rename(elsewhere)
    place(tmp_path, 3).symlink_to(elsewhere)
    assert prune(tmp_path, 2) == []
    assert find_step(tmp_path, 3).step == 3  # a link under the right number may be used


def test_checkpoints_that_were_passed_over_do_not_push_out_the_sound_ones(
    tmp_path: Path, save: Save, fill: Fill
) -> None:
    """Only sizes are compared when old ones are deleted; a flipped bit is not seen there."""
    fill(1, 2, 5, 6)
    for step in (5, 6):
        damage(place(tmp_path, step) / "__0_0.distcp", DAMAGES["bit at 0.5"])
    assert find_checkpoint(tmp_path).step == 2
    save(3)
    assert [path.name for path in prune(tmp_path, 2, newest=3)] == ["step-0000001"]
    assert find_checkpoint(tmp_path).step == 3


@pytest.mark.parametrize("way", WAYS)
def test_a_step_whose_place_is_taken_by_another_is_saved(
    tmp_path: Path, save: Save, fill: Fill, caplog: pytest.LogCaptureFixture, way: Callable
) -> None:
    fill(1, 2)
    way(tmp_path, 1, 3)
    save(3)
    assert find_checkpoint(tmp_path).step == 3
    (aside,) = tmp_path.glob("step-0000003.misnamed-*")
    assert read_manifest(aside).step == 1
    assert f"it is now {aside}" in caplog.text


def test_a_dangling_link_in_the_place_of_a_step(tmp_path: Path, save: Save, fill: Fill) -> None:
    fill(1)
    place(tmp_path, 2).symlink_to("nowhere")
    assert find_checkpoint(tmp_path).step == 1
    save(2)
    assert find_checkpoint(tmp_path).step == 2


@pytest.mark.parametrize(
    "pointer",
    [
        b"[" * 100_000,
        b'{"checkpoint": ' + b"9" * 5000 + b"}",
        b'{"checkpoint": null}',
        b'{"checkpoint": ["step-0000002"]}',
        b'{"checkpoint": "\\ud800"}',
        b"\0" * 200,
        b" " * 100_000,
    ],
)
def test_a_broken_pointer_hides_nothing(
    tmp_path: Path,
    save: Save,
    fill: Fill,
    find: Callable,
    caplog: pytest.LogCaptureFixture,
    pointer: bytes,
) -> None:
    fill(1, 2)
    (tmp_path / "latest.json").write_bytes(pointer)
    assert find(tmp_path).step == 2
    assert "the newest sound checkpoint is taken" in caplog.text
    save(3)
    assert find(tmp_path).step == 3


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to itself"])
def test_a_pointer_that_is_no_file_hides_nothing(
    tmp_path: Path, fill: Fill, find: Callable, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    fill(1, 2)
    pointer = tmp_path / "latest.json"
    pointer.unlink()
    if kind == "pipe":
        os.mkfifo(pointer)
    elif kind == "folder":
        pointer.mkdir()
    else:
        pointer.symlink_to("/dev/zero" if kind == "device" else "latest.json")
    assert find(tmp_path).step == 2
    assert "the newest sound checkpoint is taken" in caplog.text
