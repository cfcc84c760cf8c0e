"""A prepared data set on disk: JSON lines beside the index of their byte offsets, or shards.

`tools/prepare_data.py` makes both. What is wrong with them is found here, before any worker starts.
"""

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.data.json_lines import INDEX_SUFFIX, OFFSET, JsonLines
from megatron_dattn.data.rejection import SampleError
from megatron_dattn.data.shard_reader import ShardReader
from megatron_dattn.data.shards import ShardSet, open_shards
from megatron_dattn.data.system_errors import patiently
from megatron_dattn.errors import DataError

# What nobody asks for, but what a number of records, once written as a weight, amounts to.
MAX_WEIGHT = 1000


@dataclass(frozen=True)
class PreparedDataset:
    """A data set that can be read."""

    path: Path
    image_root: Path
    """Of images that do not come with their records."""
    weight: float
    num_samples: int
    fingerprint: str  # changes when records are added, removed or change their length
    shards: ShardSet | None = None
    """Of the folder of an Energon WebDataset; else the path is that of JSON lines."""

    @property
    def name(self) -> str:
        return self.path.stem if self.shards is None else self.path.name


def open_dataset(config: DatasetConfig) -> PreparedDataset:
    """Check a data set and its image root.

    Raises:
        DataError: it is missing, not prepared, damaged, or changed since it was prepared.
        OutageError: the system does not read it, however often it is asked.
    """
    try:
        return patiently(f"data set '{config.path}'", lambda: _opened(config))
    except OSError as error:
        raise DataError(f"data set '{config.path}' cannot be read: {error}") from error


def _opened(config: DatasetConfig) -> PreparedDataset:
    path = Path(config.path)
    _require_weight(config)
    if path.is_dir():
        return _opened_shards(path, config)
    if not path.is_file():
        raise DataError(f"data set '{path}' does not exist")
    if path.suffix != ".jsonl":
        raise DataError(
            f"data set '{path}' is not prepared: run `python tools/prepare_data.py {path} --output "
            "FOLDER` and use the .jsonl file it writes"
        )
    image_root = Path(config.image_root) if config.image_root is not None else path.parent
    if not image_root.is_dir():
        raise DataError(f"image root '{image_root}' of data set '{path}' is not a folder")
    offsets = _read_index(path)
    with contextlib.suppress(SampleError):  # the loader counts it
        JsonLines(path, len(offsets) - 1)[0]
    return PreparedDataset(
        path=path.absolute(),
        image_root=image_root.absolute(),
        weight=config.weight,
        num_samples=len(offsets) - 1,
        fingerprint=hashlib.sha256(offsets.tobytes()).hexdigest(),
    )


def _require_weight(config: DatasetConfig) -> None:
    if not 0 < config.weight <= MAX_WEIGHT:
        raise DataError(
            f"data set '{config.path}' has weight {config.weight:g}, which must be positive and at "
            f"most {MAX_WEIGHT}: it is how often an epoch shows each record, so that a file's "
            "share is its records times its weight; leave it out to show every record once"
        )


def _opened_shards(path: Path, config: DatasetConfig) -> PreparedDataset:
    if config.image_root is not None:
        raise DataError(
            f"data set '{path}' is a folder of shards, which bring their images along; leave its "
            "image_root out"
        )
    shards = open_shards(path.absolute(), config.split)
    with contextlib.suppress(SampleError):  # the loader counts it
        ShardReader(shards)[0]
    return PreparedDataset(
        path=path.absolute(),
        image_root=path.absolute(),
        weight=config.weight,
        num_samples=shards.num_records,
        fingerprint=shards.fingerprint,
        shards=shards,
    )


def _read_index(path: Path) -> np.ndarray:
    """Where each line starts, and where the last one ends: uint64 [lines + 1].

    All of it is checked, since all of it is read anyway for the fingerprint: 8 bytes a record.

    Raises:
        DataError: there is none, or it is not this file's.
        OSError: it cannot be read.
    """
    index, size = Path(f"{path}{INDEX_SUFFIX}"), path.stat().st_size
    if not index.is_file():
        raise DataError(
            f"data set '{path}' has no index: run `python tools/prepare_data.py {path} --output "
            "FOLDER`"
        )
    content = b""
    if index.stat().st_size <= (size + 1) * OFFSET.size:  # else it has more entries than bytes
        content = index.read_bytes()
    offsets = np.frombuffer(content[: len(content) // OFFSET.size * OFFSET.size], np.uint64)
    if (
        len(offsets) * OFFSET.size != len(content)
        or len(offsets) < 2
        or (offsets[0], offsets[-1]) != (0, size)
        or not np.all(offsets[:-1] < offsets[1:])
    ):
        raise DataError(
            f"data set '{path}' was changed after its index was made, or the index '{index}' is "
            "damaged; prepare it again with tools/prepare_data.py"
        )
    return offsets
