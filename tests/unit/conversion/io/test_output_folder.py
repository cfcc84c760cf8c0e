"""A new folder gets its name after everything in it has reached the disk."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dattn.conversion.hf_export.run import export_checkpoint
from megatron_dattn.conversion.hf_import.run import import_checkpoint
from megatron_dattn.conversion.io.output_folder import new_folder
from tests.support.run_folders import make_run_folder
from tests.unit.conversion.hf_models import save_language, save_vision


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Of each folder of a conversion that was renamed: what in it had not been synced by then."""
    synced: dict[int, int] = {}
    found: dict[str, list[str]] = {}
    fsync, rename = os.fsync, Path.rename

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_mtime_ns

    def move(path: Path, target: Path) -> Path:
        entries = [path, *path.rglob("*")]
        # A file that was written again after its sync has another time.
        late = [e for e in entries if synced.get(e.stat().st_ino) != e.stat().st_mtime_ns]
        found[target.name] = [str(entry.relative_to(path)) for entry in late]
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", move)
    return found


def fill(folder: Path) -> None:
    (folder / "inner" / "empty").mkdir(parents=True)
    for name in ("a.json", "inner/b.bin"):
        (folder / name).write_text(name)


def test_files_and_folders_at_any_depth(tmp_path, unsynced):
    with new_folder(tmp_path / "out") as folder:
        fill(folder)
    assert unsynced == {"out": []}
    assert (tmp_path / "out" / "inner" / "b.bin").read_text() == "inner/b.bin"


def test_the_check_is_able_to_fail(tmp_path, unsynced):
    fill(tmp_path / "in")
    (tmp_path / "in").rename(tmp_path / "out")
    assert set(unsynced["out"]) == {".", "a.json", "inner", "inner/b.bin", "inner/empty"}


@pytest.fixture
def originals(tmp_path: Path) -> Path:
    save_vision(tmp_path / "vision")
    save_language(tmp_path / "language")
    return tmp_path


def run_import(base: Path, output: Path) -> None:
    import_checkpoint(base / "vision", base / "language", output)


def run_export(base: Path, output: Path) -> None:
    make_run_folder(base, base / "run", "dattn")
    export_checkpoint(base / "run", output)


@pytest.mark.parametrize("convert", [run_import, run_export])
def test_conversions_in_both_directions(
    originals: Path, unsynced: dict[str, list[str]], convert: Callable[[Path, Path], None]
) -> None:
    convert(originals, originals / "out")
    assert unsynced["out"] == []
    assert any((originals / "out").iterdir())
