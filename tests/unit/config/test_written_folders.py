"""Names and places that a run cannot write into are refused in one line before it starts."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dattn.config.training import CheckpointConfig, LoggingConfig
from megatron_dattn.config.written_folders import check_place
from megatron_dattn.errors import ConfigError

BAD_NAMES = {
    "": "is empty",
    "  ": "is empty",
    "a\nb": "control character",
    "a\0b": "control character",
    "a\x1b[31mb": "control character",
    "a\udcffb": "not UTF-8",
    "x" * 300: "a part of 300 bytes",
}


@pytest.mark.parametrize(("name", "words"), BAD_NAMES.items(), ids=repr)
def test_names_that_lines_and_files_cannot_hold(name: str, words: str) -> None:
    builders: dict[str, Callable[[], object]] = {
        "checkpoint.save": lambda: CheckpointConfig(save=name),
        "checkpoint.load": lambda: CheckpointConfig(load=name),
        "logging.tensorboard_dir": lambda: LoggingConfig(tensorboard_dir=name),
        "logging.sample_ledger": lambda: LoggingConfig(sample_ledger=name),
    }
    for setting, build in builders.items():
        with pytest.raises(ConfigError, match=words) as error:
            build()
        assert str(error.value).startswith(setting)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 250


@pytest.mark.parametrize("name", ["a b  c", "run/", "step-5", "step-0000005/run", "\u00e4/\u6f22"])
def test_names_that_are_fine(name: str) -> None:
    CheckpointConfig(save=name, load=name)


@pytest.mark.parametrize("name", ["step-0000005", "runs/step-0000005/", "/runs/step-12345678"])
def test_a_checkpoint_s_own_name_is_no_run_folder(name: str) -> None:
    """One may be loaded by its name, but nothing is saved below it."""
    with pytest.raises(ConfigError, match="is the name of one checkpoint; name the run folder"):
        CheckpointConfig(save=name)
    CheckpointConfig(load=name)


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        check_place("checkpoint.save", folder)
    assert str(error.value).startswith(f"checkpoint.save {folder}")
    assert str(error.value).isprintable()
    return str(error.value)


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "deep")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("folder", "link", "new", "new/and/deep", "link/new"):
        check_place("checkpoint.save", tmp_path / name)
    assert "is a file, not a folder" in refused(tmp_path / "file")
    assert "is a file, not a folder" in refused(tmp_path / "file" / "below")
    for name in ("dangling", "loop", "dangling/below"):
        assert "is a link that leads nowhere" in refused(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    check_place("checkpoint.save", Path("new/and/deep"))
    # As on a read-only file system, or for somebody who is not root.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"{tmp_path} cannot be written into" in refused(tmp_path / "new" / "deep")


def test_nothing_is_saved_into_a_checkpoint(tmp_path: Path) -> None:
    """It would no longer be what its manifest lists."""
    checkpoint = tmp_path / "step-0000005"
    checkpoint.mkdir()
    check_place("checkpoint.save", checkpoint / "run")  # a folder of that name alone is none
    (checkpoint / "manifest.json").write_text("{}")
    assert f"lies in the checkpoint {checkpoint}" in refused(checkpoint / "run" / "deep")
