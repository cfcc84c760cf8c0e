"""From LLaVA's JSON to what the loader reads: JSON lines, their index, and a config snippet.

Every record gets a `key`, the file's name and the record's zero-padded number in it, which appears
in logs and sample ledgers: LLaVA's own ids are not unique. Records are not judged here, but for
missing images where that is asked for; the loader skips and counts bad ones, and `check.py` lists
them beforehand.

How often a file is shown is decided by the `data` section that a run is started with: an epoch
shows every record of each file `weight` times. The section that is written here names the weights
of the mixture, 1 where it gives none; a recipe that lists the files itself replaces it as a whole.
"""

import json
import os
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import yaml

from megatron_dattn.data.dataset import MAX_WEIGHT
from megatron_dattn.data.json_lines import INDEX_SUFFIX, OFFSET, as_line
from megatron_dattn.data.missing import records_with_images, write_list
from megatron_dattn.errors import ConfigError, DataError, quoted
from megatron_dattn.runtime.os_errors import named
from megatron_dattn.yaml_files import CONFIG_DIR, read_yaml

_SAMPLING = re.compile(r"(first|end|random):(\d+)(%?)")


@dataclass(frozen=True)
class Source:
    """One LLaVA file of a mixture."""

    path: Path
    image_root: Path | None = None
    weight: float = 1.0
    sampling: str = "all"
    """`all`, or `first:N`, `end:N`, `random:N` where N is a number of records or a percentage."""


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


def read_records(path: Path) -> list[Any]:
    """All records of a .json (one list) or .jsonl (one object per line) file.

    Raises:
        DataError: the file is missing, is not JSON or holds something else than records.
    """
    try:
        data = path.read_bytes()
        # UTF-8, -16 or -32, with a byte-order mark or without: JSON's first characters tell.
        text = data.decode(json.detect_encoding(data))
        if path.suffix == ".jsonl":
            # Files that were put together one behind the other have marks in the middle too.
            lines = (line.removeprefix("\ufeff").strip() for line in text.split("\n"))
            records = [json.loads(line) for line in lines if line]
        else:
            records = json.loads(text)
    except FileNotFoundError as error:
        raise DataError(f"'{path}' does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"'{path}' cannot be read as JSON: {error}") from error
    if not isinstance(records, list) or not records:
        raise DataError(f"'{path}' must hold a list of records and at least one of them")
    return records


def select_records(records: list[Any], sampling: str, *, seed: int = 0) -> list[tuple[int, Any]]:
    """The records that a sampling strategy takes, with their numbers, in the order of the file."""
    numbered = list(enumerate(records))
    if sampling == "all":
        return numbered
    match = _SAMPLING.fullmatch(sampling)
    if match is None:
        raise DataError(
            f"sampling strategy '{sampling}' is unknown; use all, first:N, end:N or random:N, with "
            "N a number or a percentage such as 10%"
        )
    kind, number, percent = match[1], int(match[2]), match[3]
    count = min(len(records), -(-len(records) * number // 100) if percent else number)
    if count == 0:
        raise DataError(f"sampling strategy '{sampling}' takes no records")
    if kind == "first":
        return numbered[:count]
    if kind == "end":
        return numbered[-count:]
    return sorted(random.Random(seed).sample(numbered, count))


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
    count = 0
    try:
        with named(path), lines_part.open("wb") as lines, index_part.open("wb") as index:
            for record in records:
                index.write(OFFSET.pack(lines.tell()))
                lines.write(as_line(record))
                count += 1
            index.write(OFFSET.pack(lines.tell()))
        lines_part.rename(path)
        index_part.rename(index_path)
    finally:
        lines_part.unlink(missing_ok=True)
        index_part.unlink(missing_ok=True)
    return count


def prepare(
    sources: list[Source],
    output: Path,
    *,
    section: str = "train",
    seed: int = 0,
    drop_missing: bool = False,
) -> Iterator[Prepared]:
    """Prepare a mixture; yields what became of each source as it is done.

    After the last one, `<output>/<section>.yaml` holds the `data` section to train with: pass it to
    pretrain_vlm.py with --config.

    Args:
        drop_missing: leave out selected records that name images which are not there, and list them
            in `<name>.missing.txt`.

    Raises:
        DataError: an input cannot be read, an output exists already, or no record is left.
    """
    config_path = output / f"{section}.yaml"
    names = _names(sources)
    for path in (config_path, *(output / f"{name}.jsonl" for name in names)):
        if path.exists():
            raise DataError(f"'{path}' exists already; remove it or choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    entries = []
    for source, name in zip(sources, names, strict=True):
        image_root = source.image_root or source.path.parent
        if not image_root.is_dir():
            raise DataError(f"image root '{image_root}' of '{source.path}' is not a folder")
        records = select_records(read_records(source.path), source.sampling, seed=seed)
        done = _write_records(records, source, output / f"{name}.jsonl", image_root, drop_missing)
        entries.append(
            {
                "path": f"{CONFIG_DIR}/{done.path.name}",
                "image_root": _named_from(output, image_root),
                "weight": source.weight,
            }
        )
        yield done
    with named(config_path):
        config_path.write_text(yaml.safe_dump({"data": {section: entries}}, sort_keys=False))


def _write_records(
    records: list[tuple[int, Any]], source: Source, path: Path, image_root: Path, drop_missing: bool
) -> Prepared:
    if not drop_missing:
        return Prepared(source, path, write_jsonl(_keyed(records, path.stem), path))
    missing: list[tuple[int, str]] = []
    kept = list(records_with_images(records, image_root, missing))
    if not kept:
        raise DataError(
            f"every selected record of '{source.path}' names an image that is not below "
            f"'{image_root}', for example {quoted(missing[0][1])}; is --image-root right?"
        )
    count = write_jsonl(_keyed(kept, path.stem), path)
    if not missing:
        return Prepared(source, path, count)
    missing_list = path.with_suffix(".missing.txt")
    write_list(missing, missing_list)
    return Prepared(source, path, count, len(missing), missing_list)


def _named_from(folder: Path, path: Path) -> str:
    """A path in a configuration of `folder`, which may be moved with what it holds."""
    folder, path = (Path(os.path.abspath(name)) for name in (folder, path))  # links stay links
    inside = path.is_relative_to(folder)
    return str(Path(CONFIG_DIR, path.relative_to(folder)) if inside else path)


class _MixtureEntry(TypedDict, total=False):
    json_path: str
    image_root: str | None
    weight: float
    sampling_strategy: str


class _Mixture(TypedDict):
    datasets: list[_MixtureEntry]


def read_mixture(path: Path) -> list[Source]:
    """The sources named by a mixture file in LLaVA-NeXT's form.

    `datasets:` is a list of `json_path`, and optionally `image_root`, `weight` and
    `sampling_strategy`; relative paths count from the mixture file.

    Raises:
        DataError: the file is missing or has another form.
    """
    try:
        content = read_yaml(path, _Mixture)
    except ConfigError as error:
        raise DataError(f"mixture '{path}' cannot be read: {error}") from error
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise DataError(f"mixture '{path}' must have a list 'datasets'")
    return [_mixture_entry(path, entry) for entry in entries]


def _mixture_entry(mixture: Path, entry: Any) -> Source:
    known = {"json_path", "image_root", "weight", "sampling_strategy"}
    if not isinstance(entry, dict) or "json_path" not in entry or set(entry) - known:
        raise DataError(f"mixture '{mixture}': an entry has {sorted(known)}, got {quoted(entry)}")
    root, weight = entry.get("image_root"), entry.get("weight", 1.0)
    if not isinstance(entry["json_path"], str) or not isinstance(root, str | None):
        raise DataError(
            f"mixture '{mixture}': json_path and image_root are paths, got {quoted(entry)}"
        )
    if not isinstance(weight, int | float) or not 0 < weight <= MAX_WEIGHT:
        raise DataError(
            f"mixture '{mixture}': a weight is how often an epoch shows each record of a file, a "
            f"positive number up to {MAX_WEIGHT}, got {quoted(weight)}"
        )
    return Source(
        path=mixture.parent / entry["json_path"],
        image_root=None if root is None else mixture.parent / root,
        weight=float(weight),
        sampling=str(entry.get("sampling_strategy", "all")),
    )


def _names(sources: list[Source]) -> list[str]:
    """File names without suffix, made distinct by numbers."""
    names: list[str] = []
    for source in sources:
        name, number = source.path.stem, 2
        while name in names:
            name, number = f"{source.path.stem}-{number}", number + 1
        names.append(name)
    return names


def _keyed(records: list[tuple[int, Any]], name: str) -> Iterator[Any]:
    for number, record in records:
        yield {**record, "key": f"{name}-{number:09d}"} if isinstance(record, dict) else record
