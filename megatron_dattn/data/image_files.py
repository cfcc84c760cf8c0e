"""Finding and reading the files of images that nobody has checked: below their root, and plain.

Records of shards and of parquet files bring theirs along, as bytes under the names they give them.
What is wrong with a file rejects its sample; what is wrong with the system that should read it
does not (system_errors.py).
"""

import io
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.data.system_errors import patiently
from megatron_dattn.errors import UserError, quoted

MAX_FILE_BYTES = 256 * 1024 * 1024
MAX_PATH_BYTES = 4096  # Linux's
_PART_BYTES = 2**20
_MAX_PARTS = MAX_FILE_BYTES // _PART_BYTES + 1
_ADDRESS = re.compile(r"(data|https?|ftp|file|s3|gs|hdfs):", re.IGNORECASE)


@dataclass(frozen=True)
class EmbeddedImages:
    """Files of images that came with their record."""

    files: Mapping[str, bytes]
    """By the names that the record has for them."""
    root: str | None = None
    """Where those are that did not come along; None: nowhere."""


class RecordWithImages(dict[str, Any]):
    """A record that brings files of images along."""

    files: Mapping[str, bytes]

    def __init__(self, record: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        super().__init__(record)
        self.files = files

    def __reduce__(self) -> tuple[type["RecordWithImages"], tuple[Any, Any]]:
        return type(self), (dict(self), self.files)


ImageRoot = str | EmbeddedImages


def images_of(record: Any, root: str) -> ImageRoot:
    """Images of a record: below a folder, but for those that it brings along."""
    return EmbeddedImages(record.files, root) if isinstance(record, RecordWithImages) else root


def locate_image(root: str, path: str) -> str:
    """The place of an image below `root`, whether it is there or not.

    The path may be absolute, but may not leave the root; links that the owner put below it are
    followed.

    Raises:
        SampleError: the path is outside the root, or is no path.
    """
    if _ADDRESS.match(path):
        kind = "a data URI" if path[:5].lower() == "data:" else "an address"
        raise SampleError(Reason.BAD_RECORD, f"image {quoted(path)} is {kind}; only files are read")
    if not _can_be_a_path(path):
        raise SampleError(
            Reason.MISSING_IMAGE, f"image path {quoted(path)} is none that a file has"
        )
    root = os.path.abspath(root)
    place = os.path.normpath(os.path.join(root, path))
    if not _is_below(place, root):
        raise SampleError(
            Reason.MISSING_IMAGE, f"image path {quoted(path)} leaves its image root {quoted(root)}"
        )
    return place


def _can_be_a_path(path: str) -> bool:
    """Whether the system could be asked for it, which else fails in many ways and places."""
    try:
        return b"\0" not in (name := os.fsencode(path)) and len(name) < MAX_PATH_BYTES
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON may spell it
        return False


def _is_below(place: str, root: str) -> bool:
    """By name; or else by what the names stand for, as one of them may go through a link."""
    for name in (str, os.path.realpath):
        folder = name(root)
        if name(place).startswith(folder if folder.endswith(os.sep) else folder + os.sep):
            return True
    return False


def read_image_file(root: ImageRoot, path: str) -> bytes:
    """The bytes of an image below `root`, or of one that came with its record.

    Raises:
        SampleError: the file is missing, outside the root, too large, or not a regular file.
        DataError: the system does not read it, however often it is asked, or memory ran out.
    """
    name = f"image {place_name(root, path)}"
    try:
        return patiently(name, lambda: _read(root, path))
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: characters that no file name has
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise SampleError(Reason.MISSING_IMAGE, f"{name}: {why}") from error


def image_is_there(root: ImageRoot, path: str) -> bool:
    """True if a path names a regular file below `root`, or one that came with its record.

    Raises:
        SampleError: the path is outside the root, or is no path.
        DataError: the system does not say, however often it is asked.
    """
    if isinstance(root, EmbeddedImages):
        if path in root.files or root.root is None:
            return path in root.files
        root = root.root
    place = locate_image(root, path)
    try:
        status = patiently(f"image {quoted(path)} below {quoted(root)}", lambda: os.stat(place))
    except UserError:
        raise
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(status.st_mode)


def place_name(root: ImageRoot, path: str) -> str:
    """A file's path and where it is looked for, for people."""
    folder = root.root if isinstance(root, EmbeddedImages) else root
    return quoted(path) if folder is None else f"{quoted(path)} below {quoted(folder)}"


@contextmanager
def opened_file(root: ImageRoot, path: str) -> Iterator[BinaryIO]:
    """A regular file below `root`, or one that came with its record, open for reading.

    Raises:
        SampleError: it is outside the root, no regular file, or did not come with its record.
        OSError: it cannot be opened.
    """
    if isinstance(root, EmbeddedImages):
        if path in root.files:
            yield io.BytesIO(root.files[path])
            return
        if root.root is None:
            locate_image(os.sep, path)  # what no file can be is refused as everywhere
            raise SampleError(
                Reason.MISSING_IMAGE, f"image {quoted(path)} was not there when the shard was made"
            )
        root = root.root
    # Without O_NONBLOCK, a named pipe would be waited for.
    descriptor = os.open(locate_image(root, path), os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise SampleError(Reason.MISSING_IMAGE, f"{quoted(path)} is not a regular file")
        yield file


def _read(root: ImageRoot, path: str) -> bytes:
    with opened_file(root, path) as file:
        size, parts = file.seek(0, os.SEEK_END), list[bytes]()
        file.seek(0)
        if size <= MAX_FILE_BYTES:
            # Whatever is there: some file systems do not know the size, and a file may grow.
            parts = list(islice(iter(lambda: file.read(_PART_BYTES), b""), _MAX_PARTS))
            size = sum(map(len, parts))
        if size > MAX_FILE_BYTES:
            raise SampleError(Reason.HUGE_IMAGE, f"image {quoted(path)} has {size} bytes")
        return b"".join(parts)
