"""The folder of an Energon WebDataset: tars of many records, the index of each beside it.

`.nv-meta/.info.json` counts the records of every shard, `split.yaml` says which shards a part has,
and `*.tar.idx` holds the byte offset of every record and of the last one's end. What does not fit
together is found here, before any worker starts; shard_reader.py reads the records.
"""

import hashlib
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import TypedDict

import numpy as np
from braceexpand import braceexpand

from megatron_dattn.data.json_lines import INDEX_SUFFIX, OFFSET
from megatron_dattn.errors import ConfigError, DataError
from megatron_dattn.runtime.untrusted_file import read_json_object
from megatron_dattn.yaml_files import read_yaml

META_FOLDER = ".nv-meta"
REMEDY = "prepare the data set again with tools/prepare_data.py, or copy it again"


@dataclass(frozen=True)
class ShardSet:
    """The shards of one part of a data set, and where each record stands in them."""

    paths: tuple[Path, ...]
    offsets: tuple[np.ndarray, ...]
    """Of each shard, uint64 [records + 1]: where its records start, and where the last one ends."""

    @property
    def num_records(self) -> int:
        return sum(len(offsets) - 1 for offsets in self.offsets)

    @property
    def fingerprint(self) -> str:
        """Changes when records are added, removed, moved or change their length."""
        digest = hashlib.sha256()
        for path, offsets in zip(self.paths, self.offsets, strict=True):
            digest.update(path.name.encode() + b"\0" + offsets.tobytes())
        return digest.hexdigest()


class _Splits(TypedDict, total=False):
    split_parts: dict[str, list[str]]
    exclude: list[str]


def is_shard_folder(path: Path) -> bool:
    """True for the folder of an Energon data set."""
    return (path / META_FOLDER).is_dir()


def open_shards(folder: Path, split: str = "train") -> ShardSet:
    """Check a data set's folder, all its indexes included.

    Args:
        split: which part of the data set, by the names of its `split.yaml`.

    Raises:
        DataError: it is no Energon WebDataset, has no such part, or a shard or index is missing,
            cut or another one than the folder's `.info.json` counts.
        OSError: it cannot be read.
    """
    counts = _shard_counts(folder)
    names = _shards_of_split(folder, split, len(counts))
    if unknown := [name for name in names if name not in counts]:
        raise DataError(
            f"data set '{folder}': part '{split}' names '{unknown[0]}', which .info.json does not "
            f"count; {REMEDY}"
        )
    paths = tuple(folder / name for name in names)
    if missing := [path for path in paths if not path.is_file()]:
        raise DataError(
            f"data set '{folder}' has {len(missing)} of its {len(paths)} shards missing, '"
            f"{missing[0].name}' is the first; {REMEDY}"
        )
    offsets = tuple(
        _read_index(path, counts[name]) for path, name in zip(paths, names, strict=True)
    )
    return ShardSet(paths, offsets)


def _shard_counts(folder: Path) -> dict[str, int]:
    path = folder / META_FOLDER / ".info.json"
    try:
        counts = read_json_object(path, DataError).get("shard_counts")
    except FileNotFoundError:
        raise DataError(
            f"'{folder}' is no Energon data set that was prepared to its end: '{path}' does not "
            "exist; run tools/prepare_data.py (again)"
        ) from None
    if not isinstance(counts, dict) or not all(type(n) is int and n > 0 for n in counts.values()):
        raise DataError(f"'{path}' must hold the number of records of every shard; {REMEDY}")
    for name in counts:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"'{path}' names the shard '{name}', which is not below the folder")
    return counts


def _shards_of_split(folder: Path, split: str, most: int) -> list[str]:
    path = folder / META_FOLDER / "split.yaml"
    try:
        content = read_yaml(path, _Splits)
        parts = content["split_parts"]
        names = list(
            islice(chain.from_iterable(map(braceexpand, parts.get(split) or ())), most + 1)
        )
        excluded = {name for text in content.get("exclude") or () for name in braceexpand(text)}
    except ConfigError as error:
        raise DataError(f"data set '{folder}': {error}; {REMEDY}") from error
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise DataError(f"'{path}' must hold the shards of every part; {REMEDY}") from error
    if single := sorted(name for name in excluded if "/" in name and name not in names):
        raise DataError(
            f"'{path}' excludes the single record '{single[0]}'; only whole shards can be excluded"
        )
    names = [name for name in names if name not in excluded]
    if not names:
        raise DataError(
            f"data set '{folder}' has no shards in part '{split}'; its parts are "
            f"{', '.join(f'{name} ({len(some or ())})' for name, some in parts.items())}"
        )
    return names


def _read_index(path: Path, count: int) -> np.ndarray:
    """Where each record starts, and where the last one ends: uint64 [records + 1]."""
    index, size = Path(f"{path}{INDEX_SUFFIX}"), path.stat().st_size
    if not index.is_file():
        raise DataError(f"shard '{path}' has no index '{index.name}'; {REMEDY}")
    length = index.stat().st_size
    if length != (count + 1) * OFFSET.size:
        raise DataError(
            f"index '{index}' has {length // OFFSET.size - 1} records, but .info.json counts "
            f"{count}: one of them was changed; {REMEDY}"
        )
    offsets = np.frombuffer(index.read_bytes(), np.uint64)
    if not np.all(offsets[:-1] < offsets[1:]):
        raise DataError(f"index '{index}' is damaged: its offsets do not ascend; {REMEDY}")
    if offsets[-1] > size:
        raise DataError(
            f"shard '{path}' has {size} bytes, but its records end at {offsets[-1]}: it was cut; "
            f"{REMEDY}"
        )
    return offsets
