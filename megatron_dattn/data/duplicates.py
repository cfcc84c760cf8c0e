"""Records that say the same, and images of the same bytes, found by a hash of eight bytes each.

Two of a hundred million different ones have the same hash with a probability of 3e-4.
"""

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from megatron_dattn.data.image_files import (
    EmbeddedImages,
    ImageRoot,
    RecordWithImages,
    locate_image,
)

_NAMES = ("id", "key")  # of a record; they say nothing about what is in it


def hash_of(content: str | bytes) -> int:
    """A signed 64-bit hash that is the same in every process and on every machine."""
    # Half a character has a hash too.
    data = content.encode(errors="surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little", signed=True)


def bytes_hash(data: bytes) -> str:
    """The hash of a file's bytes as a text."""
    return blake2b(data, digest_size=16).hexdigest()


def content_hash(record: Any) -> int | None:
    """The hash of what is in a record: everything but its names, and the bytes of images that came
    with it. None if it is nested so deep that it cannot be written down."""
    files = record.files if isinstance(record, RecordWithImages) else {}
    if isinstance(record, dict):
        record = {key: value for key, value in record.items() if key not in _NAMES}
    brought = {name: bytes_hash(data) for name, data in files.items()}
    try:
        return hash_of(json.dumps([record, brought] if brought else record, sort_keys=True))
    except RecursionError:
        return None


@dataclass(frozen=True)
class ImageHashes:
    """What tells an image apart."""

    content: int
    """A hash of its bytes."""
    place: int | None
    """A hash of where its file is; None where it came with its record."""

    @classmethod
    def of(cls, data: bytes, root: ImageRoot, path: str) -> "ImageHashes":
        """Of an image that was read from there."""
        if isinstance(root, EmbeddedImages):
            if path in root.files or root.root is None:
                return cls(hash_of(data), None)
            root = root.root
        return cls(hash_of(data), hash_of(locate_image(root, path)))


class SeenImages:
    """Remembers the images of records; 16 bytes each."""

    def __init__(self) -> None:
        self._contents = array("q")
        self._places = array("I")
        self._records = array("I")

    def add(self, record: int, images: Iterable[ImageHashes]) -> None:
        """Take the images of the next record; one that came with it is nowhere else."""
        for image in images:
            self._contents.append(image.content)
            # Half a hash will do, as it is compared among images of the same bytes alone.
            self._places.append((record if image.place is None else image.place) & 0xFFFFFFFF)
            self._records.append(record)

    def repeated(self) -> Iterator[tuple[int, int]]:
        """Each record with an image whose bytes an earlier record has in another place, and the
        first such record."""
        last = -1
        for image, first in repeated(self._contents):
            record, other = self._records[image], self._records[first]
            if self._places[image] != self._places[first] and record not in (last, other):
                yield record, other
                last = record


def repeated(hashes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The places of all hashes that stand further ahead too, each with the first such place.

    It takes 16 bytes per hash for as long as it works.
    """
    values = np.asarray(hashes, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    is_first = np.ones(len(values), dtype=bool)
    is_first[1:] = values[order[1:]] != values[order[:-1]]
    starts = np.flatnonzero(is_first)
    later = np.flatnonzero(~is_first)
    firsts = order[starts[np.searchsorted(starts, later, side="right") - 1]]
    by_place = np.argsort(order[later])
    yield from zip(order[later][by_place].tolist(), firsts[by_place].tolist(), strict=True)
