"""TensorBoard's file: readable, and no reason to end a run."""

import errno
import os
import resource
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_dattn.training.event_file import EventFile


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(point.step, point.value) for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_a_resumed_run_replaces_the_steps_it_does_again(tmp_path: Path) -> None:
    for first, value in ((1, 1.0), (3, 2.0)):
        file = EventFile(tmp_path, purge_step=first)
        file.add_text("stage", "one", first - 1)
        for step in range(first, 5):
            file.add_scalars({"a": value, "b": -value}, step)
        file.close()
        # Files are read in the order of their names, which begin with the second they were made in.
        (made,) = [path for path in tmp_path.iterdir() if ".second" not in path.name]
        made.rename(tmp_path / f"events.out.tfevents.000000000{first}.second")
    found = points(tmp_path)
    assert found["a"] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    assert found["b"] == [(1, -1.0), (2, -1.0), (3, -2.0), (4, -2.0)]


def test_points_that_get_lost_are_told_three_times(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """When it begins, when it is over, and at the end; not with every point."""
    file = EventFile(tmp_path, purge_step=1)
    file.add_scalars({"a": 1.0}, 1)
    (path,) = tmp_path.iterdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 7, hard))
        for step in (2, 3, 4):
            file.add_scalars({"a": 1.0, "b": 1.0}, step)
        (message,) = caplog.messages
        assert "TensorBoard's file cannot be written: File too large" in message
        assert "ulimit -f" in message
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file.add_scalars({"a": 5.0}, 5)
    file.add_scalars({"a": 6.0}, 6)
    file.close()
    assert caplog.messages[1:] == [
        "TensorBoard's file is written again; 6 points are lost",
        f"6 points are missing in TensorBoard's file {path}",
    ]
    assert points(tmp_path) == {"a": [(1, 1.0), (5, 5.0), (6, 6.0)]}


def test_a_disk_that_is_full_from_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head of the file is not lost: without it nobody could read what follows."""
    file = EventFile(tmp_path, purge_step=1)

    def refuse(data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(file._file, "append", refuse)
        file.add_text("stage", "one", 0)
    file.add_scalars({"a": 1.0}, 1)
    file.close()
    assert points(tmp_path) == {"a": [(1, 1.0)]}
    assert "the disk is full" in caplog.messages[0]
