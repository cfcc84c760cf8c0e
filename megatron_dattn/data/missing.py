"""Leaving out the records that name images which are not there.

Of some sets of images many people have a part (SAM's for ShareGPT4V). Dropping their records when
preparing keeps the loader from looking for them in every epoch, and counts what is left right.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_dattn.data.conversation import image_paths
from megatron_dattn.data.image_files import image_is_there
from megatron_dattn.data.rejection import Reason, SampleError

_THREADS = 16  # waiting for a network's file system, not computing
_RECORDS_AT_A_TIME = 4096


def missing_image(record: Any, image_root: str) -> str | None:
    """The first image of a record that is not there, if any.

    Records that are wrong in another way are not judged: the loader counts them.

    Raises:
        DataError: the system does not say whether an image is there.
    """
    try:
        paths = image_paths(record) if isinstance(record, dict) else ()
        for path in paths:
            if not image_is_there(image_root, path):
                return path
    except SampleError as error:
        return path if error.reason == Reason.MISSING_IMAGE else None
    return None


def records_with_images(
    records: list[tuple[int, Any]], image_root: Path, missing: list[tuple[int, str]]
) -> Iterator[tuple[int, Any]]:
    """Numbered records whose images are there; the others' numbers and images go to `missing`."""
    root = str(image_root)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(records), _RECORDS_AT_A_TIME):
            chunk = records[start : start + _RECORDS_AT_A_TIME]
            absent = pool.map(lambda numbered: missing_image(numbered[1], root), chunk)
            for (number, record), path in zip(chunk, absent, strict=True):
                if path is None:
                    yield number, record
                else:
                    missing.append((number, path))


def write_list(missing: list[tuple[int, str]], path: Path) -> None:
    """One line per dropped record: its number in the original file, a tab, the image as JSON
    text."""
    lines = (f"{number}\t{json.dumps(image)}\n" for number, image in missing)
    path.write_text("".join(lines), encoding="utf-8")
