"""Random damage of a run folder: what disks, copies and tidy people do to checkpoints.

Each kind is a function that changes the folder, drawn and steered by one seeded generator, so that
a seed names a damage for good. What is right afterwards is decided from the bytes alone
(`sound_steps`), without the program under test.

Links and pipes that one damage has left are never read, written or followed by the next: a copy of
/dev/zero fills the disk, and a link leads out of the folder.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.support.forged_checkpoints import forge_manifest

Contents = dict[int, dict[str, bytes]]
"""The bytes of every file, by step and name."""

# What stands in a JSON file where something else belongs.
_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 3, 10**90, 1.5, float("nan"), "", "3", "\ud800", [], [1], {}, {"a": 1}
)  # fmt: skip
_TEXTS = (
    "",
    "{",
    "[]",
    "null",
    "[" * 5000,
    '{"a":' * 5000,
    '{"step": ' + "9" * 5000 + "}",
    "\0" * 64,
)


def contents(folder: Path, steps: tuple[int, ...]) -> Contents:
    """What a run folder holds before it is damaged."""
    return {
        step: {file.name: file.read_bytes() for file in _step(folder, step).iterdir()}
        for step in steps
    }


def sound_steps(folder: Path, before: Contents) -> list[int]:
    """Steps that a run folder holds under their names, in plain files, byte for byte."""
    return [step for step, files in before.items() if _holds(_step(folder, step), files)]


def _holds(folder: Path, files: dict[str, bytes]) -> bool:
    for name, data in files.items():
        path = folder / name
        try:
            if path.is_symlink() or not path.is_file() or path.read_bytes() != data:
                return False
        except OSError:
            return False
    return True


def mutate(folder: Path, random: Random) -> str:
    """Damage a run folder in one to three ways; says which."""
    chosen = random.choices(KINDS, k=random.choice((1, 1, 1, 2, 3)))
    names = []
    for kind in chosen:
        try:
            kind(folder, random)
        except (OSError, ValueError, LookupError):
            continue  # a former one has taken away what this one changes
        names.append(kind.__name__.strip("_"))
    return " + ".join(names)


def _step(folder: Path, step: int) -> Path:
    return folder / f"step-{step:07d}"


def _any_step(folder: Path, random: Random) -> Path:
    """One of the step folders, the newest twice as often."""
    steps = sorted(
        path
        for path in folder.iterdir()
        if path.name.startswith("step-") and path.is_dir() and not path.is_symlink()
    )
    return random.choice([*steps, steps[-1]])


def _any_file(folder: Path, random: Random) -> Path:
    return random.choice(sorted(filter(_is_plain, _any_step(folder, random).iterdir())))


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _read(path: Path) -> bytes:
    if not _is_plain(path):
        raise FileNotFoundError(path)
    return path.read_bytes()


def _write(path: Path, data: bytes) -> None:
    """Put a new file in the place of whatever is there."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True)


def _other_name(folder: Path, random: Random) -> Path:
    """A name that is not taken: mostly a step's, before or behind the others."""
    names = (
        *(f"step-{random.choice((0, 5, 99, 12345678)):07d}" for _ in range(3)),
        "best",
        "step-3",
    )
    return folder / random.choice([name for name in names if not (folder / name).exists()])


def flip_bits(folder: Path, random: Random) -> None:
    file = _any_file(folder, random)
    data = bytearray(_read(file))
    for _ in range(random.choice((1, 1, 8))):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    _write(file, data)


def truncate(folder: Path, random: Random) -> None:
    file = _any_file(folder, random)
    os.truncate(file, random.randrange(file.stat().st_size))


def write_zeros(folder: Path, random: Random) -> None:
    """What a power cut leaves of blocks that were not written."""
    file = _any_file(folder, random)
    data = _read(file)
    start = random.choice((0, len(data) // 2))
    _write(file, data[:start] + bytes(len(data) - start))


def lengthen(folder: Path, random: Random) -> None:
    file = _any_file(folder, random)
    _write(file, _read(file) + random.randbytes(random.choice((1, 100))))


def delete_file(folder: Path, random: Random) -> None:
    _any_file(folder, random).unlink()


def exchange_files(folder: Path, random: Random) -> None:
    """Of two steps, or of one."""
    first, second = _any_file(folder, random), _any_file(folder, random)
    if random.random() < 0.7:
        second = _any_step(folder, random) / first.name
    one, other = _read(first), _read(second)
    _write(first, other)
    _write(second, one)


def copy_file(folder: Path, random: Random) -> None:
    source = _any_file(folder, random)
    _write(_any_step(folder, random) / source.name, _read(source))


def copy_all_but_the_manifest(folder: Path, random: Random) -> None:
    source, target = _any_step(folder, random), _any_step(folder, random)
    for file in filter(_is_plain, source.iterdir()):
        if file.name != "manifest.json":
            _write(target / file.name, _read(file))


def link_file(folder: Path, random: Random) -> None:
    file, target = _any_file(folder, random), _any_file(folder, random)
    file.unlink()
    file.symlink_to(random.choice((target, "/dev/zero", file)))


def pipe_instead_of_a_file(folder: Path, random: Random) -> None:
    file = random.choice((_any_file(folder, random), folder / "latest.json"))
    file.unlink()
    os.mkfifo(file)


def folder_instead_of_a_file(folder: Path, random: Random) -> None:
    file = random.choice((_any_file(folder, random), folder / "latest.json"))
    file.unlink()
    file.mkdir()


def rename_step(folder: Path, random: Random) -> None:
    _any_step(folder, random).rename(_other_name(folder, random))


def copy_step(folder: Path, random: Random) -> None:
    _copy(_any_step(folder, random), _other_name(folder, random))


def link_step(folder: Path, random: Random) -> None:
    _other_name(folder, random).symlink_to(_any_step(folder, random).name)


def exchange_steps(folder: Path, random: Random) -> None:
    first, second = _any_step(folder, random), _any_step(folder, random)
    first.rename(folder / "aside")
    if first != second:
        second.rename(first)
    (folder / "aside").rename(second)


def one_step_instead_of_another(folder: Path, random: Random) -> None:
    source, target = _any_step(folder, random), _any_step(folder, random)
    if source != target:
        shutil.rmtree(target)
        _copy(source, target)


def move_step_and_link(folder: Path, random: Random) -> None:
    step = _any_step(folder, random)
    step.rename(folder / "other-disk")
    step.symlink_to("other-disk")


def delete_step(folder: Path, random: Random) -> None:
    shutil.rmtree(_any_step(folder, random))


def no_folder_instead_of_a_step(folder: Path, random: Random) -> None:
    step = _any_step(folder, random)
    shutil.rmtree(step)
    random.choice((os.mkfifo, Path.touch, lambda path: path.symlink_to(path.name)))(step)


def copy_into_a_step(folder: Path, random: Random) -> None:
    source = _any_step(folder, random)
    _copy(source, _any_step(folder, random) / "step-0000099")


def change_json(folder: Path, random: Random) -> None:
    """Another value in a JSON file, the manifest's or another; its sum is then wrong."""
    name = random.choice(("manifest.json", "manifest.json", "metadata.json"))
    path = random.choice((_any_step(folder, random) / name, folder / "latest.json"))
    content = json.loads(_read(path))
    _change_one(content, random)
    _write(path, json.dumps(content).encode())


def forge_json(folder: Path, random: Random) -> None:
    """Another value in a manifest, whose sum is then right."""
    field = random.choice(("step", "layout", "files", "versions", "created"))

    def change(body: dict[str, Any]) -> None:
        if random.random() < 0.3:
            del body[field]
        elif field == "files" and random.random() < 0.7:
            name = random.choice(("/dev/zero", "../latest.json", "nothing.bin"))
            body[field][name] = {"size": 0, "sha256": "0" * 64}
        else:
            body[field] = random.choice([value for value in _VALUES if value not in (3, {})])

    step = _any_step(folder, random)
    if _is_plain(step / "manifest.json"):
        forge_manifest(step, change)


def no_json(folder: Path, random: Random) -> None:
    name = random.choice(("manifest.json", "metadata.json"))
    path = random.choice((_any_step(folder, random) / name, folder / "latest.json"))
    _write(path, random.choice(_TEXTS).encode())


def wrong_pointer(folder: Path, random: Random) -> None:
    pointer = folder / "latest.json"
    name = random.choice(("step-0000001", "step-0000099", "../..", ""))
    _write(pointer, json.dumps({"checkpoint": name}).encode())
    if not name:
        pointer.unlink()


def stray_files(folder: Path, random: Random) -> None:
    """What does not belong there and changes nothing."""
    source = _any_step(folder, random)
    _write(folder / "manifest.json", _read(source / "manifest.json"))
    _write(source / "notes.txt", b"mine")
    os.mkfifo(source / "pipe")


def _change_one(content: dict[str, Any], random: Random) -> None:
    holder: Any = content
    while True:
        key = random.choice(sorted(holder))
        if not isinstance(holder[key], dict) or not holder[key] or random.random() < 0.3:
            break
        holder = holder[key]
    if random.random() < 0.3:
        del holder[key]
    else:
        holder[key] = random.choice(_VALUES)


KINDS: tuple[Callable[[Path, Random], None], ...] = (
    flip_bits, truncate, write_zeros, lengthen, delete_file, exchange_files, copy_file,
    copy_all_but_the_manifest, link_file, pipe_instead_of_a_file, folder_instead_of_a_file,
    rename_step, copy_step, link_step, exchange_steps, one_step_instead_of_another,
    move_step_and_link, delete_step, no_folder_instead_of_a_step, copy_into_a_step, change_json,
    forge_json, no_json, wrong_pointer, stray_files,
)  # fmt: skip
HARMLESS = (
    copy_step, link_step, move_step_and_link, copy_into_a_step, wrong_pointer, stray_files
)  # fmt: skip
"""Those after which all steps are still there."""
