"""Leaving out records: those that name images which are not there, those that a list names.

Of some sets of images many people have a part (SAM's for ShareGPT4V). Dropping their records when
preparing keeps the loader from looking for them in every epoch, and counts what is left right.
"""

import json
import os
from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from megatron_dattn.data.conversation import image_paths
from megatron_dattn.data.image_files import image_is_there, images_of
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.errors import DataError

_THREADS = 16  # waiting for a network's file system, not computing
RECORDS_AT_A_TIME = 4096
WITH_IMAGES_AT_A_TIME = 32  # each may hold megabytes


def missing_image(record: Any, image_root: str) -> str | None:
    """The first image of a record that is not there, if any.

    Records that are wrong in another way are not judged: the loader counts them.

    Raises:
        DataError: the system does not say whether an image is there.
    """
    try:
        paths = image_paths(record) if isinstance(record, dict) else ()
        images = images_of(record, image_root)
        for path in paths:
            if not image_is_there(images, path):
                return path
    except SampleError as error:
        return path if error.reason == Reason.MISSING_IMAGE else None
    return None


class MissingList:
    """Context manager that writes which records are left out: one line for each of them, its
    number in the original file, a tab and the image as JSON text. No record, no file."""

    def __init__(self, path: Path) -> None:
        self.count = 0
        self.first: str | None = None
        self._path = path
        self._part = Path(f"{path}.part")
        self._file: TextIO | None = None

    def add(self, number: int, image: str) -> None:
        if self._file is None:
            self._file, self.first = self._part.open("w", encoding="utf-8"), image
        self._file.write(f"{number}\t{json.dumps(image)}\n")
        self.count += 1

    def __enter__(self) -> "MissingList":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is None:
            return
        self._file.close()
        if kind is None:
            self._part.rename(self._path)
        else:
            self._part.unlink()


def records_with_images(
    records: Iterable[tuple[int, Any]],
    image_root: Path,
    missing: MissingList,
    at_a_time: int = RECORDS_AT_A_TIME,
) -> Iterator[tuple[int, Any]]:
    """Numbered records whose images are there; the others' numbers and images go to `missing`.

    Args:
        at_a_time: how many records are held; those that bring images along need memory.
    """
    root, numbered = str(image_root), iter(records)
    with ThreadPoolExecutor(_THREADS) as pool:
        while some := list(islice(numbered, at_a_time)):
            absent = pool.map(lambda one: missing_image(one[1], root), some)
            for (number, record), path in zip(some, absent, strict=True):
                if path is None:
                    yield number, record
                else:
                    missing.add(number, path)


def read_exclusions(path: Path) -> dict[str, "array[int]"]:
    """The numbers of the records to leave out, in order, for each file that a list names.

    Args:
        path: what `check_data.py --list` wrote: JSON lines with `path` and `record`.

    Raises:
        DataError: it is another kind of file.
    """
    numbers: dict[str, array[int]] = defaultdict(lambda: array("q"))
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                entry = json.loads(line)
                numbers[os.path.realpath(entry["path"])].append(entry["record"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"'{path}' cannot be read as a list of records (check_data.py --list writes one): "
            f"{error}"
        ) from error
    return {name: array("q", sorted(some)) for name, some in numbers.items()}


def without(
    records: Iterable[tuple[int, Any]], excluded: Sequence[int]
) -> Iterator[tuple[int, Any]]:
    """Numbered records but for those with one of these numbers, which are in order."""
    for number, record in records:
        place = bisect_left(excluded, number)
        if place == len(excluded) or excluded[place] != number:
            yield number, record
