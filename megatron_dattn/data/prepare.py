"""From files of records to what the loader reads: JSON lines or shards, and a config snippet.

Every record gets a `key`, the file's name and the record's zero-padded number in it, which appears
in logs and sample ledgers: LLaVA's own ids are not unique. Records are not judged here, but for
missing images where that is asked for; the loader skips and counts bad ones, and `check.py` lists
them beforehand.

How often a file is shown is decided by the `data` section that a run is started with: an epoch
shows every record of each file `weight` times. The section that is written here names the weights
of the mixture, 1 where it gives none; a recipe that lists the files itself replaces it as a whole.
"""

import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from megatron_dattn.data.json_lines import INDEX_SUFFIX
from megatron_dattn.data.missing import (
    RECORDS_AT_A_TIME,
    WITH_IMAGES_AT_A_TIME,
    MissingList,
    read_exclusions,
    records_with_images,
    without,
)
from megatron_dattn.data.mixture import Source
from megatron_dattn.data.prepare_targets import (
    Choice,
    OutputLayout,
    Prepared,
    Target,
    holds_images,
    prepared_before,
    shard_results,
    targets,
    write_facts,
)
from megatron_dattn.data.prepared_lines import with_written_images, write_jsonl
from megatron_dattn.data.prepared_shards import write_shards
from megatron_dattn.data.record_files import open_rows, select_numbers, select_records
from megatron_dattn.errors import ConfigError, DataError, quoted
from megatron_dattn.runtime.os_errors import named
from megatron_dattn.yaml_files import CONFIG_DIR

Numbered = Iterator[tuple[int, Any]]


def prepare(
    sources: list[Source],
    output: Path,
    *,
    section: str = "train",
    choice: Choice | None = None,
    layout: OutputLayout | None = None,
    on_records: Callable[[int], object] = lambda count: None,
) -> Iterator[Prepared]:
    """Prepare a mixture; yields what became of each source as it is done.

    After the last one, `<output>/<section>.yaml` holds the `data` section to train with: pass it to
    pretrain_vlm.py with --config. A source that the folder holds already, prepared in the same way
    from the same file, is not prepared again; so a run that was stopped goes on where it was.

    Args:
        on_records: called with the number of records that were written since.

    Raises:
        ConfigError: the layout does not suit the sources.
        DataError: an input cannot be read or was changed, the section's file names other data, or
            no record is left.
    """
    choice, layout = choice or Choice(), layout or OutputLayout()
    require_layout(sources, layout)
    excluded = exclusions(sources, choice)
    places = targets(sources, output, choice=choice, layout=layout, excluded=excluded)
    content = _section(section, places, output)
    config_path = output / f"{section}.yaml"
    if config_path.exists() and config_path.read_text() != content:
        raise DataError(
            f"'{config_path}' exists already and names other data; remove it or choose another "
            "folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    for target in places:
        done = prepared_before(target)
        if done is None:
            # First, so that what a kill leaves of the others is known to be ours.
            write_facts(target)
            target.missing_path.unlink(missing_ok=True)
            left_out = excluded.get(os.path.realpath(target.source.path), array("q"))
            try:
                done = _prepare(target, choice, left_out, on_records)
            except RecursionError as error:
                raise DataError(
                    f"a record of '{target.source.path}' is nested too deep to be written; "
                    "check_data.py --list names it for --without"
                ) from error
        yield done
    with named(config_path):
        config_path.write_text(content)


def require_layout(sources: list[Source], layout: OutputLayout) -> None:
    """Raise ConfigError for images that come with their records and have no place to go to, or for
    a place where there are none."""
    bring = [str(source.path) for source in sources if holds_images(source.path)]
    if bring and layout.shards is None and layout.images_out is None:
        raise ConfigError(
            f"the records of '{bring[0]}' bring their images along: name a folder for these with "
            "--images-out, or take --layout webdataset"
        )
    if layout.images_out is not None and (layout.shards is not None or not bring):
        why = "go into the shards" if layout.shards is not None else "stay where they are"
        raise ConfigError(f"the images {why}; leave --images-out out")


def exclusions(sources: list[Source], choice: Choice) -> dict[str, "array[int]"]:
    """The numbers of the records to leave out, in order, for the real path of each file.

    Raises:
        DataError: the list cannot be read, or names other files.
    """
    if choice.without is None:
        return dict(choice.left_out)
    excluded = read_exclusions(choice.without)
    known = {os.path.realpath(source.path) for source in sources}
    if excluded and not known & excluded.keys():
        raise DataError(
            f"'{choice.without}' names records of {', '.join(sorted(excluded))}, and none of "
            f"{', '.join(sorted(known))}; check the files that are prepared here"
        )
    return excluded


def _section(section: str, places: list[Target], output: Path) -> str:
    return yaml.safe_dump({"data": {section: [_entry(p, output) for p in places]}}, sort_keys=False)


def _entry(target: Target, output: Path) -> dict[str, Any]:
    image_root = _named_from(output, target.written_images or target.image_root)
    return {
        "path": f"{CONFIG_DIR}/{target.path.name}",
        # Of a recipe's list that is as long, what is not named here would stay.
        "image_root": None if target.in_shards else image_root,
        "weight": target.source.weight,
    }


def _named_from(folder: Path, path: Path) -> str:
    """A path in a configuration of `folder`, which may be moved with what it holds."""
    folder, path = (Path(os.path.abspath(name)) for name in (folder, path))  # links stay links
    inside = path.is_relative_to(folder)
    return str(Path(CONFIG_DIR, path.relative_to(folder)) if inside else path)


def _prepare(
    target: Target, choice: Choice, left_out: "array[int]", on_records: Callable[[int], object]
) -> Prepared:
    missing = MissingList(target.missing_path)
    records = without(_selected(target, choice), left_out)

    def kept() -> Numbered:
        with missing:  # complete before the records appear
            root = target.image_root
            some = WITH_IMAGES_AT_A_TIME if target.has_images else RECORDS_AT_A_TIME
            checked = records_with_images(records, root, missing, some)
            yield from checked if choice.drop_missing else records

    numbered = _not_empty(kept(), target, missing)
    absent = 0
    if target.layout.shards is not None:
        written, absent = write_shards(
            numbered,
            target.path,
            image_root=target.image_root,
            source=target.source.path if target.has_images else None,
            size=target.layout.shards,
            workers=target.layout.workers,
            on_records=on_records,
        )
        write_facts(target, shard_results(target, written))
    else:
        written = _write_lines(numbered, target, on_records)
    listed = target.missing_path if missing.count else None
    return Prepared(target.source, target.path, written, missing.count, listed, absent)


def _selected(target: Target, choice: Choice) -> Numbered:
    """The source's records with their numbers; for shards, None for those whose number suffices."""
    source, shards = target.source, target.layout.shards
    by_number = shards is not None and shards.megabytes is None and not choice.drop_missing
    if by_number and (rows := open_rows(source.path)) is not None:
        numbers = select_numbers(len(rows), source.sampling, seed=choice.seed)
        return ((int(number), None) for number in numbers)
    return select_records(source.path, source.sampling, seed=choice.seed)


def _not_empty(numbered: Numbered, target: Target, missing: MissingList) -> Numbered:
    first = next(numbered, None)
    if first is None and missing.first is not None:
        target.missing_path.unlink()
        raise DataError(
            f"every selected record of '{target.source.path}' names an image that is not below "
            f"'{target.image_root}', for example {quoted(missing.first)}; is --image-root right?"
        )
    if first is None:
        raise DataError(f"all selected records of '{target.source.path}' are left out")
    return chain([first], numbered)


def _write_lines(numbered: Numbered, target: Target, on_records: Callable[[int], object]) -> int:
    path = target.path
    for rest in (path, Path(f"{path}{INDEX_SUFFIX}")):
        rest.unlink(missing_ok=True)
    if (folder := target.written_images) is not None:
        folder.mkdir(parents=True, exist_ok=True)
        numbered = with_written_images(numbered, target.image_root, folder)
    return write_jsonl(_keyed(numbered, path.stem, on_records), path)


def _keyed(
    records: Iterable[tuple[int, Any]], name: str, on_records: Callable[[int], object]
) -> Iterator[Any]:
    for number, record in records:
        yield {**record, "key": f"{name}-{number:09d}"} if isinstance(record, dict) else record
        on_records(1)
