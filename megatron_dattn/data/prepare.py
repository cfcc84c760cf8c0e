"""From LLaVA's JSON to what the loader reads: JSON lines, their index, and a config snippet.

Every record gets a `key`, the file's name and the record's zero-padded number in it, which appears
in logs and sample ledgers: LLaVA's own ids are not unique. Records are not judged here, but for
missing images where that is asked for; the loader skips and counts bad ones, and `check.py` lists
them beforehand.

How often a file is shown is decided by the `data` section that a run is started with: an epoch
shows every record of each file `weight` times. The section that is written here names the weights
of the mixture, 1 where it gives none; a recipe that lists the files itself replaces it as a whole.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml

from megatron_dattn.data.json_lines import INDEX_SUFFIX, OFFSET, as_line
from megatron_dattn.data.missing import (
    MissingList,
    missing_image,
    read_exclusions,
    records_with_images,
    without,
)
from megatron_dattn.data.mixture import Source
from megatron_dattn.data.record_files import select_records
from megatron_dattn.errors import DataError, quoted
from megatron_dattn.runtime.os_errors import named
from megatron_dattn.runtime.untrusted_file import read_json_object
from megatron_dattn.yaml_files import CONFIG_DIR


@dataclass(frozen=True)
class Prepared:
    """What became of one source."""

    source: Source
    path: Path
    """The .jsonl file."""
    num_records: int
    num_missing: int = 0
    """Records left out because an image is not there."""
    missing_list: Path | None = None
    """Names them."""


def write_jsonl(records: Iterable[Any], path: Path) -> int:
    """Write records as JSON lines with the index beside them; returns their number.

    The index is Energon's: the byte offset of every line and the size of the file, as 64-bit
    integers. Both files appear complete or not at all.

    Raises:
        DataError: one of the files exists already.
    """
    index_path = Path(f"{path}{INDEX_SUFFIX}")
    for existing in (path, index_path):
        if existing.exists():
            raise DataError(f"'{existing}' exists already; remove it or choose another folder")
    lines_part, index_part = Path(f"{path}.part"), Path(f"{index_path}.part")
    written = 0
    try:
        with named(path), lines_part.open("wb") as lines, index_part.open("wb") as index:
            for record in records:
                index.write(OFFSET.pack(lines.tell()))
                lines.write(as_line(record))
                written += 1
            index.write(OFFSET.pack(lines.tell()))
        lines_part.rename(path)
        index_part.rename(index_path)
    finally:
        lines_part.unlink(missing_ok=True)
        index_part.unlink(missing_ok=True)
    return written


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


def prepare(
    sources: list[Source], output: Path, *, section: str = "train", choice: Choice | None = None
) -> Iterator[Prepared]:
    """Prepare a mixture; yields what became of each source as it is done.

    After the last one, `<output>/<section>.yaml` holds the `data` section to train with: pass it to
    pretrain_vlm.py with --config. A source that the folder holds already, prepared in the same way
    from the same file, is not prepared again; so a run that was stopped goes on where it was.

    Raises:
        DataError: an input cannot be read, the section's file names other data, or no record is
            left.
    """
    choice = choice or Choice()
    excluded = _exclusions(sources, choice)
    places = _places(sources, output, choice, excluded)
    content = _section(section, places, output)
    config_path = output / f"{section}.yaml"
    if config_path.exists() and config_path.read_text() != content:
        raise DataError(
            f"'{config_path}' exists already and names other data; remove it or choose another "
            "folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    for place in places:
        done = _prepared_before(place)
        if done is None:
            # First, so that what a kill leaves of the others is known to be ours.
            _write_json(_facts_path(place.path), place.facts)
            for rest in (place.path, _index_path(place.path), _missing_path(place.path)):
                rest.unlink(missing_ok=True)
            source = place.source
            selected = select_records(source.path, source.sampling, seed=choice.seed)
            records = without(selected, excluded.get(os.path.realpath(source.path), ()))
            done = _write_records(records, place, choice.drop_missing)
        yield done
    with named(config_path):
        config_path.write_text(content)


@dataclass(frozen=True)
class _Target:
    """A source and where it goes."""

    source: Source
    image_root: Path
    path: Path
    facts: dict[str, Any]
    """What decides about the prepared file: with the same facts it would be the same again."""


def _exclusions(sources: list[Source], choice: Choice) -> dict[str, "array[int]"]:
    if choice.without is None:
        return {}
    excluded = read_exclusions(choice.without)
    known = {os.path.realpath(source.path) for source in sources}
    if excluded and not known & excluded.keys():
        raise DataError(
            f"'{choice.without}' names records of {', '.join(sorted(excluded))}, and none of "
            f"{', '.join(sorted(known))}; check the files that are prepared here"
        )
    return excluded


def _places(
    sources: list[Source], output: Path, choice: Choice, excluded: dict[str, "array[int]"]
) -> list[_Target]:
    places: list[_Target] = []
    for source in sources:
        image_root = source.image_root or source.path.parent
        if not image_root.is_dir():
            raise DataError(f"image root '{image_root}' of '{source.path}' is not a folder")
        left_out = excluded.get(os.path.realpath(source.path), ())
        facts = _facts(source, image_root, choice, left_out)
        path = _free_path(output, source.path.stem, [place.path for place in places], facts)
        places.append(_Target(source, image_root, path, facts))
    return places


def _section(section: str, places: list[_Target], output: Path) -> str:
    entries = [
        {
            "path": f"{CONFIG_DIR}/{place.path.name}",
            "image_root": _named_from(output, place.image_root),
            "weight": place.source.weight,
        }
        for place in places
    ]
    return yaml.safe_dump({"data": {section: entries}}, sort_keys=False)


def _facts(
    source: Source, image_root: Path, choice: Choice, left_out: Sequence[int]
) -> dict[str, Any]:
    try:
        status = source.path.stat()
    except OSError as error:
        raise DataError(f"'{source.path}' does not exist or cannot be read: {error}") from error
    return {
        "file": os.path.abspath(source.path),
        "bytes": status.st_size,
        "changed": status.st_mtime_ns,
        "sampling": source.sampling,
        "seed": choice.seed if source.sampling.startswith("random") else None,
        "images": os.path.abspath(image_root) if choice.drop_missing else None,
        "without": hashlib.sha256(array("q", left_out).tobytes()).hexdigest(),
    }


def _facts_path(path: Path) -> Path:
    return path.with_suffix(".source.json")


def _index_path(path: Path) -> Path:
    return Path(f"{path}{INDEX_SUFFIX}")


def _free_path(output: Path, stem: str, taken: list[Path], facts: dict[str, Any]) -> Path:
    """The file for a source: its own name, or that with a number where something else has it."""
    for number in count(1):
        path = output / f"{stem if number == 1 else f'{stem}-{number}'}.jsonl"
        if path not in taken and (not path.exists() or _read_facts(path) == facts):
            return path
    raise AssertionError


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(_facts_path(path), DataError)
    except FileNotFoundError:
        return {}


def _prepared_before(place: _Target) -> Prepared | None:
    """What an earlier run made of a source, if it is all there and no missing image has come."""
    path, missing_list = place.path, _missing_path(place.path)
    if not path.exists() or not _index_path(path).exists():
        return None
    num_missing, root = 0, str(place.image_root)
    if missing_list.exists():
        with missing_list.open(encoding="utf-8") as lines:
            for line in lines:
                num_missing += 1
                if missing_image({"image": json.loads(line.partition("\t")[2])}, root) is None:
                    return None
    num_records = _index_path(path).stat().st_size // OFFSET.size - 1
    missing = missing_list if num_missing else None
    return Prepared(place.source, path, num_records, num_missing, missing)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    part = Path(f"{path}.part")
    with named(path):
        part.write_text(json.dumps(content, indent=2) + "\n")
        part.rename(path)


def _missing_path(path: Path) -> Path:
    return path.with_suffix(".missing.txt")


def _write_records(
    records: Iterator[tuple[int, Any]], place: _Target, drop_missing: bool
) -> Prepared:
    source, path, missing = place.source, place.path, MissingList(_missing_path(place.path))

    def kept() -> Iterator[tuple[int, Any]]:
        with missing:  # complete before the records appear
            root = place.image_root
            yield from records_with_images(records, root, missing) if drop_missing else records

    numbered = kept()
    first = next(numbered, None)
    if first is None and missing.first is not None:
        _missing_path(path).unlink()
        raise DataError(
            f"every selected record of '{source.path}' names an image that is not below "
            f"'{place.image_root}', for example {quoted(missing.first)}; is --image-root right?"
        )
    if first is None:
        raise DataError(f"all selected records of '{source.path}' are left out")
    written = write_jsonl(_keyed(chain([first], numbered), path.stem), path)
    listed = _missing_path(path) if missing.count else None
    return Prepared(source, path, written, missing.count, listed)


def _named_from(folder: Path, path: Path) -> str:
    """A path in a configuration of `folder`, which may be moved with what it holds."""
    folder, path = (Path(os.path.abspath(name)) for name in (folder, path))  # links stay links
    inside = path.is_relative_to(folder)
    return str(Path(CONFIG_DIR, path.relative_to(folder)) if inside else path)


def _keyed(records: Iterable[tuple[int, Any]], name: str) -> Iterator[Any]:
    for number, record in records:
        yield {**record, "key": f"{name}-{number:09d}"} if isinstance(record, dict) else record
