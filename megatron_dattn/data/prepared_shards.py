"""Writing records as an Energon WebDataset: tars of some thousand records with their images.

Shards are cut in the main process, by number or size alone, and written by worker processes; so
what is in each does not depend on how many there are. A shard gets its name when it is complete.
One that is there with the records that belong into it is not written again: a run that was stopped
goes on. Images are stored byte for byte, whatever is in them: the loader judges them.

The index is made by Energon's own functions when all shards are there.
"""

import contextlib
import functools
import io
import multiprocessing
import os
import re
import signal
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_dattn.data.conversation import image_paths
from megatron_dattn.data.image_files import RecordWithImages, locate_image
from megatron_dattn.data.image_names import with_own_names
from megatron_dattn.data.json_lines import as_line
from megatron_dattn.data.record_files import NumberedRecords, open_rows
from megatron_dattn.data.rejection import SampleError
from megatron_dattn.data.shard_reader import TEXT_PART
from megatron_dattn.data.shards import META_FOLDER
from megatron_dattn.errors import DataError
from megatron_dattn.runtime.log import silence_import_warnings
from megatron_dattn.runtime.os_errors import named
from megatron_dattn.runtime.parent_process import end_with_parent

_MAX_KEY_NAME = 60  # characters: with number and part it must fit a tar's field of 100
_CRUDE = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
# Energon's `info` and `lint` know no crude data sets; as this type they read every record's text.
_TEXTS = {
    "sample_type": {"__module__": "megatron.energon", "__class__": "TextSample"},
    "field_map": {"text": TEXT_PART},
}


@dataclass(frozen=True)
class ShardSize:
    """Where a shard ends."""

    records: int = 10_000
    megabytes: int | None = None
    """A shard of more than one record is not larger; None: of any size."""


@dataclass(frozen=True)
class _Shard:
    """What a worker process writes."""

    path: Path
    name: str
    """Of the data set."""
    image_root: str
    source: Path | None
    """Where the records are read by their numbers; None: they are given."""
    records: list[tuple[int, Any]]

    @property
    def numbers(self) -> list[int]:
        return [number for number, _ in self.records]


def write_shards(
    numbered: Iterable[tuple[int, Any]],
    folder: Path,
    *,
    image_root: Path,
    source: Path | None,
    size: ShardSize,
    workers: int = 1,
    on_records: Callable[[int], object] = lambda count: None,
) -> tuple[int, int]:
    """Write what is not there yet of a folder's shards, and Energon's index of them all.

    Args:
        numbered: records and their numbers; where `source` is given, None may stand for a record.
        source: parquet files or shards, of which each worker process reads its records itself.
        on_records: called with the number of records of each shard that is done.

    Returns:
        How many records there are, and how many images of the shards written now are not there.

    Raises:
        DataError: the source cannot be read, or a worker process was killed.
    """
    total = 0
    names: list[str] = []

    def needed() -> Iterator[_Shard]:
        nonlocal total
        for records in _cut(numbered, image_root, size, keep=source is None):
            path = folder / f"shard_{len(names):05d}.tar"
            shard = _Shard(path, folder.name, str(image_root), source, records)
            names.append(path.name)
            total += len(records)
            if _holds(path, shard.numbers):
                on_records(len(records))
            else:
                yield shard

    missing = 0
    for count, absent in _written(needed(), workers):
        missing += absent
        on_records(count)
    for rest in folder.glob("shard_*.tar*"):
        if rest.name.removesuffix(".idx") not in names:
            rest.unlink()  # of another cut, by an earlier run
    write_index(folder, names, workers)
    return total, missing


def _cut(
    numbered: Iterable[tuple[int, Any]], image_root: Path, size: ShardSize, *, keep: bool
) -> Iterator[list[tuple[int, Any]]]:
    """The records of each shard."""
    most = None if size.megabytes is None else size.megabytes * 2**20
    records: list[tuple[int, Any]] = []
    filled = 0
    for number, record in numbered:
        length = 0 if most is None else _stored_bytes(record, str(image_root))
        full = most is not None and filled + length > most
        if records and (full or len(records) == size.records):
            yield records
            records, filled = [], 0
        records.append((number, record if keep else None))
        filled += length
    if records:
        yield records


def _stored_bytes(record: Any, image_root: str) -> int:
    """About what a record takes in a tar, by the sizes of its images' files."""
    lengths = [len(as_line(record))]
    files = record.files if isinstance(record, RecordWithImages) else {}
    with contextlib.suppress(SampleError):
        for path in dict.fromkeys(image_paths(record) if isinstance(record, dict) else ()):
            with contextlib.suppress(SampleError, OSError):
                data = files.get(path)
                size = (
                    os.stat(locate_image(image_root, path)).st_size if data is None else len(data)
                )
                lengths.append(size)
    return sum(tarfile.BLOCKSIZE * (1 - -length // tarfile.BLOCKSIZE) for length in lengths)


def _holds(path: Path, numbers: list[int]) -> bool:
    """True if a tar is whole and has the records with these numbers."""
    try:
        with tarfile.open(path, "r:") as tar:
            text = f".{TEXT_PART}"
            names = [member.name for member in tar if member.name.endswith(text)]
    except (OSError, tarfile.TarError):
        return False
    return [int(name.removesuffix(text).rpartition("-")[2]) for name in names] == numbers


def _written(shards: Iterable[_Shard], workers: int) -> Iterator[tuple[int, int]]:
    """Write shards; yields the number of records and of missing images of each one."""
    if workers == 1:
        for shard in shards:
            yield _write_shard(shard)
        return
    # Not forked: this process has threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_become, initargs=(os.getpid(),))
    try:
        running: set[Future[tuple[int, int]]] = set()
        for shard in shards:
            running.add(pool.submit(_write_shard, shard))
            while len(running) > workers:  # one more waits: what is cut lies in memory
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        for future in running:
            yield future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that writes shards was killed, by a lack of memory perhaps; lower --workers "
            "and run the command again: it goes on where it was"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _become(parent: int) -> None:
    """Prepare a process that writes shards; Ctrl-C is its parent's to handle."""
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@functools.lru_cache(maxsize=1)
def _rows(source: Path) -> NumberedRecords:
    """Of a source that a worker process reads for shard after shard."""
    rows = open_rows(source)
    assert rows is not None
    return rows


def _write_shard(shard: _Shard) -> tuple[int, int]:
    """Write one tar; returns its number of records and of images that are not there."""
    records = iter(shard.records)
    if shard.source is not None:
        records = _rows(shard.source).rows(shard.numbers)
    part, missing = Path(f"{shard.path}.part"), 0
    # A key ends at its first dot for Energon; whatever the file is called, it has none.
    key_name = re.sub(r"[^A-Za-z0-9_-]", "_", shard.name)[:_MAX_KEY_NAME]
    try:
        with named(shard.path), part.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for number, record in records:
                    renamed, files, absent = with_own_names(record, shard.image_root)
                    if isinstance(renamed, dict):
                        renamed = {**renamed, "key": f"{shard.name}-{number:09d}"}
                    key = f"{key_name}-{number:09d}"
                    for name, data in {TEXT_PART: as_line(renamed), **files}.items():
                        entry = tarfile.TarInfo(f"{key}.{name}")  # no time, no owner
                        entry.size = len(data)
                        tar.addfile(entry, io.BytesIO(data))
                    missing += absent
            file.flush()
            os.fsync(file.fileno())
        part.rename(shard.path)
    finally:
        part.unlink(missing_ok=True)
    return len(shard.records), missing


def write_index(folder: Path, names: list[str], workers: int) -> None:
    """Write Energon's `.nv-meta` and the index of every shard."""
    silence_import_warnings()
    # Imported late: it takes seconds, and worker processes do without.
    from megatron_dattn.data.energon import WebdatasetPreparator

    with contextlib.redirect_stdout(io.StringIO()):
        WebdatasetPreparator.prepare_dataset(
            folder.absolute(),
            names,
            split_parts_patterns=[("train", ".*"), ("val", "$"), ("test", "$")],
            workers=min(workers, len(names)),
        )
    for name, content in (("dataset.yaml", _CRUDE), ("texts.yaml", _TEXTS)):
        path = folder / META_FOLDER / name
        with named(path):
            path.write_text(yaml.safe_dump(content, sort_keys=False))
