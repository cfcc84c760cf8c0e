"""Where each source of a preparation goes, and whether it is there already.

Beside what is prepared stands `.source.json` (in a folder of shards, `source.json`), which says
from which file and how it was made. With the same facts it would be the same again: so a run goes
on where another was stopped, and nothing of others is overwritten.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from megatron_dattn.data.json_lines import INDEX_SUFFIX, OFFSET
from megatron_dattn.data.missing import missing_image
from megatron_dattn.data.mixture import Source
from megatron_dattn.data.parquet_rows import parquet_files
from megatron_dattn.data.prepared_shards import ShardSize
from megatron_dattn.data.shards import is_shard_folder, open_shards
from megatron_dattn.errors import DataError
from megatron_dattn.runtime.os_errors import named
from megatron_dattn.runtime.untrusted_file import read_json_object

_RESULTS = ("records", "shards")
"""In a folder's facts, when it is complete: the number of records, and the bytes of each shard."""


@dataclass(frozen=True)
class Choice:
    """Which records of the sources are taken."""

    seed: int = 0
    """For sampling strategy random."""
    drop_missing: bool = False
    """Leave out selected records that name images which are not there, and list them in
    `<name>.missing.txt`."""
    without: Path | None = None
    """A list of further records to leave out, as `check_data.py --list` writes it."""
    left_out: "Mapping[str, array[int]]" = field(default_factory=dict)
    """Those to leave out where there is no list: their numbers in order, for the real path of each
    file."""
    suffix: str = ""
    """Of the names of what is prepared."""


@dataclass(frozen=True)
class OutputLayout:
    """As what the records are written, and by how many processes."""

    shards: ShardSize | None = None
    """Into the shards of an Energon WebDataset, with their images; None: as JSON lines."""
    images_out: Path | None = None
    """Where images that come with their records are written, beside JSON lines."""
    workers: int = 1


@dataclass(frozen=True)
class Prepared:
    """What became of one source."""

    source: Source
    path: Path
    """The .jsonl file, or the folder of shards."""
    num_records: int
    num_missing: int = 0
    """Records left out because an image is not there."""
    missing_list: Path | None = None
    """Names them."""
    num_absent: int = 0
    """Images that are not in the shards, where their records are."""
    was_there: bool = False
    """Left as an earlier run made it."""


@dataclass(frozen=True)
class Target:
    """A source and where it goes."""

    source: Source
    image_root: Path
    path: Path
    facts: dict[str, Any]
    """What decides about the result: with the same facts it would be the same again."""
    layout: OutputLayout

    @property
    def in_shards(self) -> bool:
        return self.layout.shards is not None

    @cached_property
    def has_images(self) -> bool:
        """True if the source's records bring their images along, and can be read by number."""
        return holds_images(self.source.path)

    @property
    def written_images(self) -> Path | None:
        """The folder for images that come with their records."""
        folder = self.layout.images_out
        return folder / self.path.stem if folder is not None and self.has_images else None

    @property
    def missing_path(self) -> Path:
        return _beside(self.path, "missing.txt")


def targets(
    sources: list[Source],
    output: Path,
    *,
    choice: Choice,
    layout: OutputLayout,
    excluded: Mapping[str, "array[int]"],
) -> list[Target]:
    """Targets of the sources: names of their own, or those which they had.

    Raises:
        DataError: a source or its images' folder is not there, or the source was changed since it
            was prepared.
    """
    found: list[Target] = []
    for source in sources:
        image_root = source.image_root or source.path.parent
        if not image_root.is_dir():
            raise DataError(f"image root '{image_root}' of '{source.path}' is not a folder")
        left_out = excluded.get(os.path.realpath(source.path), ())
        facts = _facts(source, image_root, choice, layout, left_out)
        stem = _stem(source.path) + choice.suffix
        path = _free_path(output, stem, [target.path for target in found], layout, facts)
        found.append(Target(source, image_root, path, facts, layout))
    return found


def holds_images(path: Path) -> bool:
    """True if the records of a source bring their images along."""
    return is_shard_folder(path) or bool(parquet_files(path))


def _facts(
    source: Source, image_root: Path, choice: Choice, layout: OutputLayout, left_out: Sequence[int]
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "file": os.path.abspath(source.path),
        **_state(source.path),
        "sampling": source.sampling,
        "seed": choice.seed if source.sampling.startswith("random") else None,
        "images": os.path.abspath(image_root) if choice.drop_missing else None,
        "without": hashlib.sha256(array("q", left_out).tobytes()).hexdigest(),
    }
    if layout.shards is not None:
        facts["image root"] = os.path.abspath(image_root)
        facts["cut"] = [layout.shards.records, layout.shards.megabytes]
    elif holds_images(source.path):
        assert layout.images_out is not None
        facts["images out"] = os.path.abspath(layout.images_out)
    return facts


def _state(path: Path) -> dict[str, int]:
    """What changes when a source does."""
    try:
        files = [path]
        if is_shard_folder(path):
            files = list(open_shards(path).paths)
        elif some := parquet_files(path):
            files = some
        states = [file.stat() for file in files]
    except OSError as error:
        raise DataError(f"'{path}' does not exist or cannot be read: {error}") from error
    return {
        "bytes": sum(state.st_size for state in states),
        "changed": max(state.st_mtime_ns for state in states),
    }


def _free_path(
    output: Path, stem: str, taken: list[Path], layout: OutputLayout, facts: dict[str, Any]
) -> Path:
    """The name for a source: its own, or that with a number where something else has it."""
    ending = "" if layout.shards is not None else ".jsonl"
    for number in count(1):
        path = output / f"{stem if number == 1 else f'{stem}-{number}'}{ending}"
        if path in taken:
            continue
        found = _read_facts(path) if path.exists() else facts
        if found == facts:
            return path
        if found and {**found, **_changeable(facts)} == facts:
            raise DataError(
                f"'{facts['file']}' was changed since '{path}' was made of it: it had "
                f"{found['bytes']} bytes and has {facts['bytes']}, or was written again; remove "
                f"'{path}' and '{_facts_path(path)}', or choose another --output"
            )
    raise AssertionError


def _changeable(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: facts[name] for name in ("bytes", "changed")}


def _stem(path: Path) -> str:
    """What a source is called: of `data/train-*.parquet` it is `data-train`."""
    if "*" in path.name:
        return f"{path.absolute().parent.name}-{path.name.partition('*')[0]}".rstrip("-_.")
    return path.absolute().name if path.is_dir() else path.stem


def _beside(path: Path, name: str) -> Path:
    """A file about something prepared: in its folder, or with its own name in front."""
    return path.with_suffix(f".{name}") if path.suffix == ".jsonl" else path / name


def _facts_path(path: Path) -> Path:
    return _beside(path, "source.json")


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = read_json_object(_facts_path(path), DataError)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {name: value for name, value in facts.items() if name not in _RESULTS}


def write_facts(target: Target, results: Mapping[str, Any] | None = None) -> None:
    """Say what is made: before it is, and for shards with the result when it is."""
    path = _facts_path(target.path)
    part = Path(f"{path}.part")
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({**target.facts, **(results or {})}, indent=2) + "\n")
        part.rename(path)


def shard_results(target: Target, num_records: int) -> dict[str, Any]:
    """Results that are remembered of a folder of shards that is complete."""
    sizes = {path.name: path.stat().st_size for path in open_shards(target.path).paths}
    return {"records": num_records, "shards": sizes}


def prepared_before(target: Target) -> Prepared | None:
    """Result of an earlier run, if it is all there and no missing image has come."""
    num_records = _shards_there(target) if target.in_shards else _lines_there(target)
    if num_records is None:
        return None
    num_missing, root = 0, str(target.image_root)
    if target.missing_path.exists():
        with target.missing_path.open(encoding="utf-8") as lines:
            for line in lines:
                num_missing += 1
                if missing_image({"image": json.loads(line.partition("\t")[2])}, root) is None:
                    return None
    missing = target.missing_path if num_missing else None
    return Prepared(target.source, target.path, num_records, num_missing, missing, was_there=True)


def _lines_there(target: Target) -> int | None:
    index = Path(f"{target.path}{INDEX_SUFFIX}")
    needed = [target.path, index, target.written_images or target.image_root]
    if not all(path.exists() for path in needed):
        return None
    return index.stat().st_size // OFFSET.size - 1


def _shards_there(target: Target) -> int | None:
    """The records of shards that are complete and as large as they were."""
    try:
        facts = read_json_object(_facts_path(target.path), DataError)
        results = shard_results(target, facts["records"])
    except (OSError, KeyError, DataError):
        return None
    return facts["records"] if results == {name: facts.get(name) for name in results} else None
