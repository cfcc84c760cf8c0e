"""What the index of a distributed checkpoint (`.metadata`) must be, whoever wrote it.

It says in which file the values of every chunk are, and torch opens what it says: a path that leads
out of the folder, or to a file that the manifest does not list, would bring in values that no sum
covers. It also gives sizes, for which memory is taken before a value is read.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_dattn.checkpoint.manifest import FileRecord
from megatron_dattn.errors import CheckpointError
from megatron_dattn.runtime.untrusted_file import show


def check_index(metadata: dcp.Metadata, files: Mapping[str, FileRecord], where: str) -> None:
    """Check an index against the files that the manifest lists.

    Args:
        where: what messages call it.

    Raises:
        CheckpointError: naming the key whose sizes or place cannot be.
    """
    try:
        problem = _problem(metadata, files)
    except (AttributeError, TypeError, ValueError) as error:  # a class without its fields
        raise CheckpointError(f"{where} is not a checkpoint's index: {error}") from error
    if problem is not None:
        raise CheckpointError(f"{where} {problem}; do not use this checkpoint")


def _problem(metadata: dcp.Metadata, files: Mapping[str, FileRecord]) -> str | None:
    entries, places = metadata.state_dict_metadata, metadata.storage_data
    if not isinstance(entries, dict) or not isinstance(places, dict):
        return "lists no values and their places"
    for index, place in places.items():
        if not isinstance(index, MetadataIndex) or not isinstance(index.fqn, str):
            return "gives a place to something without a key"
        if (reason := _problem_of_place(place, files)) is not None:
            return f"places {show(index.fqn)} {reason}"
    num_bytes = sum(record.size for record in files.values())
    for key, entry in entries.items():
        if not isinstance(key, str):
            return "lists a value without a key"
        if (reason := _problem_of_entry(key, entry, places, num_bytes)) is not None:
            return f"has {show(key)} {reason}"
    return None


def _problem_of_place(place: Any, files: Mapping[str, FileRecord]) -> str | None:
    if not isinstance(place, _StorageInfo) or not isinstance(place.relative_path, str):
        return "nowhere"
    if place.relative_path not in files:
        return f"in {show(place.relative_path)}, a file that the manifest does not list"
    if not _are_sizes((place.offset, place.length)):
        return f"at {show(place.offset)}, {show(place.length)} bytes long"
    if place.offset + place.length > files[place.relative_path].size:
        return f"behind the end of {place.relative_path}"
    if place.transform_descriptors:
        return f"behind a transformation, {show(place.transform_descriptors)}"
    return None


def _problem_of_entry(
    key: str, entry: Any, places: Mapping[MetadataIndex, Any], num_bytes: int
) -> str | None:
    if isinstance(entry, BytesStorageMetadata):
        return None if MetadataIndex(key) in places else "without a place"
    if not isinstance(entry, TensorStorageMetadata):
        return f"as a {type(entry).__name__}"
    if not isinstance(entry.properties.dtype, torch.dtype) or not _are_sizes(entry.size):
        return "without type or shape"
    # Every value is stored, so that no tensor is larger than the files; the axes of an empty one
    # must not be either, as layers are counted along the first.
    needed = prod(max(axis, 1) for axis in entry.size) * entry.properties.dtype.itemsize
    if needed > num_bytes:
        return f"of shape {tuple(entry.size)}, for which the files are too small"
    for chunk in entry.chunks:
        if not _is_within(chunk, entry.size):
            return "with a chunk outside of its shape"
        if MetadataIndex(key, chunk.offsets) not in places:
            return f"without a place for its chunk at {tuple(chunk.offsets)}"
    return None


def _is_within(chunk: Any, shape: torch.Size) -> bool:
    if not isinstance(chunk, ChunkStorageMetadata):
        return False
    if not len(chunk.offsets) == len(chunk.sizes) == len(shape):
        return False
    places = zip(chunk.offsets, chunk.sizes, shape, strict=True)
    return _are_sizes((*chunk.offsets, *chunk.sizes)) and all(
        first + length <= axis for first, length, axis in places
    )


def _are_sizes(values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)
