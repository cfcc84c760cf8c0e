"""Reads distributed checkpoints without running anything that they contain.

`.metadata` is a pickle, and megatron-core unpickles stored objects without restriction: whoever can
write such a file could run code in every job that loads it. Here `.metadata` may only name the
handful of classes that it consists of, and objects are loaded with `weights_only=True`. Weights can
still be tampered with, therefore `check_trusted` refuses what anybody on the machine may write.
"""

import io
import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    StateDict,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from megatron_dattn.checkpoint.index_fields import check_index
from megatron_dattn.checkpoint.manifest import Manifest, require_listed
from megatron_dattn.checkpoint.metadata_unpickler import MetadataUnpickler
from megatron_dattn.errors import CheckpointError
from megatron_dattn.runtime.untrusted_file import open_plain

logger = logging.getLogger(__name__)

METADATA_FILE = ".metadata"


def read_metadata(folder: Path) -> dcp.Metadata:
    """The index of a distributed checkpoint: shapes, types and places of everything stored.

    Raises:
        CheckpointError: if it is missing, damaged, or names anything but plain metadata.
    """
    path = folder / METADATA_FILE
    try:
        with open_plain(path, follow_links=False) as file:
            metadata = MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is no distributed checkpoint: {path.name} is missing"
        ) from None
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{path} is damaged or not a checkpoint's: {error}") from error
    if not isinstance(metadata, dcp.Metadata):
        raise CheckpointError(f"{path} is not a checkpoint's index but a {type(metadata).__name__}")
    return metadata


def read_index(folder: Path, manifest: Manifest) -> dcp.Metadata:
    """The index, checked against the files that the manifest lists.

    Raises:
        CheckpointError: as for `read_metadata`; also if it is not covered by the manifest's sums,
            or places values where they are not.
    """
    require_listed(folder, manifest, (METADATA_FILE,))
    metadata = read_metadata(folder)
    check_index(metadata, manifest.files, str(folder / METADATA_FILE))
    return metadata


def check_trusted(folder: Path, names: Iterable[str]) -> None:
    """Refuse a checkpoint that every user of the machine may write; name a foreign owner.

    Raises:
        CheckpointError: if the folder or one of its files is writable for others, or missing.
    """
    owners = set()
    for path in (folder, *(folder / name for name in names)):
        try:
            status = path.stat()
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        owners.add(status.st_uid)
        sticky = path == folder and status.st_mode & stat.S_ISVTX
        if status.st_mode & stat.S_IWOTH and not sticky:
            raise CheckpointError(
                f"{path} may be written by every user of this machine and is not trusted; check "
                f"where it comes from, then `chmod -R o-w {folder}`"
            )
    strangers = owners - {os.getuid(), 0}
    if strangers:
        logger.warning("%s belongs to another user (uid %s)", folder, sorted(strangers))


class _Reader(dcp.FileSystemReader):
    def __init__(self, folder: str | Path, metadata: dcp.Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


class _LoadPlanner(MCoreLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        with torch.serialization.safe_globals([io.BytesIO]):
            loaded = torch.load(value, map_location="cpu", weights_only=True)
        self.state_dict[read_item.dest_index.fqn] = loaded


def read_shards(
    sharded_state_dict: ShardedStateDict, folder: Path, metadata: dcp.Metadata
) -> StateDict:
    """Read what the state dict asks for, in place where it holds tensors. Collective.

    Source: TorchDistLoadShardedStrategy.load in megatron-core's strategies/torch.py.

    Args:
        metadata: the checkpoint's index, from `read_metadata`.

    Raises:
        torch.distributed.checkpoint.CheckpointException: on all ranks, if one failed.
    """
    tensors = [t for t in nested_values(sharded_state_dict) if isinstance(t, ShardedTensor)]
    flat, flat_mapping, rename_mapping = _replace_state_dict_keys_with_sharded_keys(
        sharded_state_dict
    )
    request = mcore_to_pyt_state_dict(flat, is_loading=True)
    planner = _LoadPlanner(
        shapes_validation_sharded_tensors=[t for t in tensors if not t.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={t.key: t for t in tensors if t.allow_shape_mismatch},
        flatten_state_dict=False,
        flatten_sharded_tensors=False,
    )
    dcp.load(request, storage_reader=_Reader(folder, metadata), planner=planner)
    loaded = {key: _unwrap_pyt_sharded_tensor(value) for key, value in request.items()}
    state = _replace_sharded_keys_with_state_dict_keys(loaded, flat_mapping, rename_mapping)
    _restore_dict_types(state, sharded_state_dict)
    return state


def stored_shapes(metadata: dcp.Metadata) -> dict[str, tuple[int, ...] | None]:
    """Global shape of every stored tensor by key; None for stored objects."""
    shapes: dict[str, tuple[int, ...] | None] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            shapes[ShardedObject.empty_from_unique_key(key).key] = None
        else:
            shapes[key] = tuple(entry.size)
    return shapes


def stored_dtypes(metadata: dcp.Metadata) -> dict[str, torch.dtype | None]:
    """Dtype of every stored tensor by key; None for stored objects."""
    return {
        key: None if isinstance(entry, BytesStorageMetadata) else entry.properties.dtype
        for key, entry in metadata.state_dict_metadata.items()
    }
