"""Records that say the same, found by a hash of eight bytes each.

Two of a hundred million different records have the same hash with a probability of 3e-4.
"""

import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from megatron_dattn.data.image_files import RecordWithImages

_NAMES = ("id", "key")  # of a record; they say nothing about what is in it


def hash_of(text: str) -> int:
    """A signed 64-bit hash that is the same in every process and on every machine."""
    data = text.encode(errors="surrogatepass")  # half a character has a hash too
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
