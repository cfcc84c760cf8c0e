"""Single records of an Energon WebDataset, in any order.

A record's text and images stand together in a tar, so that it costs one read at a known place and
no file has to be found: what file systems with slow directories (Lustre) want. Records of shards
come in the same order as those of JSON lines would. A tar that was cut or written anew is one
error, and never a record that is lost.
"""

import io
import json
import os
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any

from megatron_dattn.data.conversation import image_paths
from megatron_dattn.data.image_files import EmbeddedImages, RecordWithImages
from megatron_dattn.data.json_lines import require_line_length
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.data.shards import REMEDY, ShardSet
from megatron_dattn.data.system_errors import patiently
from megatron_dattn.errors import DataError

TEXT_PART = "json"
IMAGE_PARTS = frozenset(("jpg", "jpeg", "png", "webp", "gif", "img"))
"""Endings of image files; `img` is a file whose kind is not known."""
VIDEO_PARTS = frozenset(("mp4", "mov", "mkv", "webm", "avi"))

_MAX_RECORD_BYTES = 2**30  # more than that a system call does not read at once
_OPEN_TARS = 128


@dataclass(frozen=True)
class ShardSample:
    """A record as it stands in a shard."""

    text: bytes
    """JSON, not yet parsed."""
    images: EmbeddedImages


class ShardReader:
    """The records of shards. Tars are opened at the first use, in the process that reads."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._ends = list(accumulate(len(offsets) - 1 for offsets in shards.offsets))
        self._files: OrderedDict[int, int] = OrderedDict()  # of the tars that were used last

    def __getitem__(self, record: int) -> ShardSample:
        """One record with its images.

        Raises:
            DataError: the shard cannot be read, or does not belong to its index (any more).
            OutageError: the system fails, and goes on failing.
            SampleError: the record is too large, or has no text.
        """
        shard = bisect_right(self._ends, record)
        offsets, path = self._shards.offsets[shard], self._shards.paths[shard]
        number = record - self._ends[shard] + len(offsets) - 1
        start, end = int(offsets[number]), int(offsets[number + 1])
        what = f"record {number} of shard '{path}'"
        if end - start > _MAX_RECORD_BYTES:
            raise SampleError(
                Reason.BAD_RECORD,
                f"{what} has {end - start} bytes; at most {_MAX_RECORD_BYTES} are read",
            )
        try:
            data = patiently(what, lambda: os.pread(self._open(shard), end - start, start))
        except OSError as error:
            raise DataError(
                f"{what} cannot be read: {error.strerror or error}; {REMEDY}"
            ) from error
        parts = _parts(data) if len(data) == end - start else None
        if parts is None:
            raise DataError(
                f"{what} is not where the index has it: the tar was cut, damaged or written anew; "
                f"{REMEDY}"
            )
        return _sample(parts, what)

    def _open(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= _OPEN_TARS:
                os.close(self._files.popitem(last=False)[1])
            # Reads name their place, so workers that are forked later may share the descriptor.
            self._files[shard] = os.open(self._shards.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        self._files.move_to_end(shard)
        return self._files[shard]

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)


def _parts(data: bytes) -> dict[str, bytes] | None:
    """The files of one record by what stands behind their first dot; None if it is not one."""
    parts: dict[str, bytes] = {}
    keys = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                key, _, part = PurePosixPath(member.name).name.partition(".")
                keys.add(key)
                end = member.offset_data + member.size
                if not member.isreg() or end > len(data):
                    return None
                parts[part] = data[member.offset_data : end]
            # At a damaged header in the middle, tarfile stops as it does at the end.
            whole = tar.offset == len(data)
    except tarfile.TarError:
        return None
    return parts if whole and len(keys) == 1 else None


def _sample(parts: Mapping[str, bytes], what: str) -> ShardSample:
    if TEXT_PART not in parts:
        raise SampleError(
            Reason.BAD_RECORD, f"{what} has no '{TEXT_PART}'; its parts are {', '.join(parts)}"
        )
    require_line_length(len(parts[TEXT_PART]))
    kinds = IMAGE_PARTS | VIDEO_PARTS
    images = {name: data for name, data in parts.items() if _ending(name) in kinds}
    return ShardSample(parts[TEXT_PART], EmbeddedImages(images))


def _ending(part: str) -> str:
    return part.rpartition(".")[2].lower()


def as_record(value: Any, images: EmbeddedImages) -> Any:
    """The record of a sample of somebody else's tars, which name images in other ways.

    Megatron-LM's example stores the list of turns alone beside `jpg`; others leave the record as it
    was, with the path that its image had. What names its images by their parts stays as it is. A
    video beside it is called likewise.
    """
    names = list(images.files)
    videos = [name for name in names if _ending(name) in VIDEO_PARTS]
    if isinstance(value, list):
        pictures = [name for name in names if name not in videos]
        return {"conversations": value, "image": pictures, "videos": videos}
    if not isinstance(value, dict) or len(names) != 1:
        return value
    try:
        paths = image_paths(value)
    except SampleError:
        return value
    if not paths or (len(paths) == 1 and paths[0] not in images.files):
        several, own = ("video", "videos") if videos else ("images", "image")
        return {**{k: v for k, v in value.items() if k != several}, own: names}
    return value


@dataclass(frozen=True)
class ShardRows:
    """The records of a folder of shards, parsed, with their images."""

    shards: ShardSet

    def __len__(self) -> int:
        return self.shards.num_records

    def rows(self, numbers: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """Records with their numbers; the text alone where it is not JSON, for others to judge."""
        reader = ShardReader(self.shards)
        for number in numbers:
            try:
                sample = reader[number]
                value = as_record(json.loads(sample.text), sample.images)
            except DataError as error:
                if not isinstance(error, SampleError):
                    raise
                value = str(error)
            except (ValueError, RecursionError):
                value = sample.text.decode(errors="replace")
            found = isinstance(value, dict) and bool(sample.images.files)
            yield number, RecordWithImages(value, sample.images.files) if found else value
