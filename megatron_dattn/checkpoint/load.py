"""Strict loading of a checkpoint into a sharded state dict.

megatron-core writes into live parameters while it reads, and passes over keys and vocabulary sizes
that do not fit. Here keys, shapes and sharding are compared on all ranks before the first tensor is
touched, and every failure is one CheckpointError on all ranks. After a failure nothing may go on
with the model: the entry points end.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    StateDict,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.utils import (
    extract_sharded_base,
    force_all_tensors_to_non_fp8,
)
from megatron.core.dist_checkpointing.validation import (
    determine_global_metadata,
    validate_sharding_integrity,
)
from megatron.core.msc_utils import MultiStorageClientFeature

from megatron_dattn.checkpoint import reader
from megatron_dattn.checkpoint.manifest import Manifest, read_manifest, require_listed
from megatron_dattn.errors import CheckpointError
from megatron_dattn.runtime.rank_errors import as_checkpoint_error, on_all_ranks, on_first_rank
from megatron_dattn.runtime.untrusted_file import open_plain, read_json_object

_SHOWN = 8
_FORMAT_FILE = "metadata.json"
# megatron-core 0.19 has none of the common state any more; it reads common.pt all the same.
_FORMAT_FIELDS = {
    f"{part}_backend{version}" for part in ("sharded", "common") for version in ("", "_version")
}

Shapes = dict[str, tuple[int, ...] | None]
OlderNames = Callable[[ShardedStateDict, Mapping[str, torch.dtype | None]], set[str]]


def load_checkpoint(
    path: str | os.PathLike[str],
    sharded_state_dict: ShardedStateDict,
    *,
    modules: Sequence[str] | None = None,
    without: Callable[[str], bool] | None = None,
    older_names: OlderNames | None = None,
) -> StateDict:
    """Load what a sharded state dict asks for. Collective over the world; verify first.

    Args:
        path: a checkpoint folder, as `find_checkpoint` gives it.
        sharded_state_dict: what to load; its tensors are filled in place.
        modules: load only keys below these names (`language_model` for `language_model.*`), and
            leave out everything else on both sides. None: request and checkpoint must agree fully.
            Transformer Engine's `_extra_state` may differ either way.
        without: of these modules' keys, which to leave out on both sides.
        older_names: is given the request and the dtypes of all that is stored (None for objects),
            may change keys of the request, and returns those of the checkpoint that need not be
            asked for.

    Returns:
        The state dict with values in place of shards, and the checkpoint's common state.

    Raises:
        CheckpointError: on all ranks alike. Keys and shapes are compared before anything is
            written; after a failure of reading itself the tensors are undefined.
    """
    assert dist.is_initialized(), "initialize_distributed first (a world of one is fine)"
    MultiStorageClientFeature.disable()
    folder = Path(path)
    manifest = on_first_rank(f"checking {folder}", lambda: _check_folder(folder))
    metadata, common = on_all_ranks(
        f"reading {folder}", lambda: _read_small_files(folder, manifest)
    )
    request, stored = sharded_state_dict, reader.stored_shapes(metadata)
    if older_names is not None:
        spare = older_names(request, reader.stored_dtypes(metadata))
        stored = {key: shape for key, shape in stored.items() if key not in spare}
    if modules is not None:
        wanted = _selection(modules, without)
        request, _ = extract_matching_values(request, lambda v: wanted(getattr(v, "key", "")))
        stored = {key: shape for key, shape in stored.items() if wanted(key)}
    request = on_all_ranks("comparing the keys", lambda: _fit(folder, request, stored))

    return on_all_ranks(f"loading {folder}", lambda: _read_into(request, folder, metadata, common))


def _read_into(
    request: ShardedStateDict, folder: Path, metadata: dcp.Metadata, common: StateDict
) -> StateDict:
    """What megatron-core's `dist_checkpointing.load` does, with the restricted readers.

    Its own reads the common state by itself: each rank alone, where a failure is nobody else's.
    """
    # FP8 tensors of Transformer Engine would be read into as they are: their scales, which follow
    # from the values, would be those from before.
    force_all_tensors_to_non_fp8(request)
    # Factories ask for the parts of a fused parameter (gate and up projection), joined below.
    request, local, factories = load_preprocess(request)
    state = dict(common)
    merge(state, local)
    shards, _ = extract_sharded_base(request)
    try:
        merge(state, reader.read_shards(shards, folder, metadata))
    except dcp.CheckpointException as error:
        raise _first_failure(f"loading {folder}", error) from error
    return apply_factory_merges(state, factories)


def _first_failure(purpose: str, error: dcp.CheckpointException) -> CheckpointError:
    """torch's report of all failing ranks (a BaseException) as one error of this package."""
    if not error.failures:
        return CheckpointError(f"{purpose} failed: {error.args[0]}")
    failing = min(error.failures)
    reason = error.failures[failing][0]
    if not isinstance(reason, Exception):
        raise reason  # an interrupt, not a failure
    local = as_checkpoint_error(purpose, reason)
    return type(local)(f"rank {failing}: {local}")


def _check_folder(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    require_listed(folder, manifest, (_FORMAT_FILE, COMMON_STATE_FNAME))
    reader.check_trusted(folder, manifest.files)
    return manifest


def _read_small_files(folder: Path, manifest: Manifest) -> tuple[dcp.Metadata, StateDict]:
    _check_format(folder)
    return reader.read_index(folder, manifest), read_common(folder)


def _check_format(folder: Path) -> None:
    """Raise CheckpointError unless megatron-core's marker says what we can read.

    Its own reader waits for a pipe, breaks at nested lists, and passes over what it does not know
    or fails at it, depending on its version.
    """
    path = folder / _FORMAT_FILE
    try:
        content = read_json_object(path, CheckpointError, follow_links=False)
    except FileNotFoundError:
        content = {}
    unknown = content.keys() - _FORMAT_FIELDS
    if unknown:
        raise CheckpointError(f"{path} has {', '.join(sorted(unknown))}: of a newer format")
    if content.get("sharded_backend") != "torch_dist":
        raise CheckpointError(f"{folder} is no distributed checkpoint of format torch_dist")


def read_common(folder: Path) -> dict[str, Any]:
    """The part of a checkpoint that is not sharded.

    Raises:
        CheckpointError: if it is missing, damaged or holds more than plain data.
    """
    path = folder / COMMON_STATE_FNAME
    try:
        with open_plain(path, follow_links=False) as file:
            common = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except Exception as error:  # a damaged archive may raise anything
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(common, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(common).__name__}")
    return common


def _selection(
    modules: Sequence[str], without: Callable[[str], bool] | None
) -> Callable[[str], bool]:
    prefixes = tuple(f"{name}." for name in modules)
    return lambda key: key.startswith(prefixes) and not (without is not None and without(key))


def _fit(folder: Path, request: ShardedStateDict, stored: Shapes) -> ShardedStateDict:
    """Compare the request of all ranks with what is stored; drop extra state that is not there."""
    sharded, _, _ = load_preprocess(request)
    sharded, _ = extract_sharded_base(sharded)
    _, by_rank = determine_global_metadata(sharded)
    entries = [entry for entries in by_rank for entry in entries]
    requested: Shapes = {
        entry.key: entry.global_shape if isinstance(entry, ShardedTensor) else None
        for entry in entries
    }
    flexible = {entry.key for entry in entries if getattr(entry, "allow_shape_mismatch", False)}
    problems = _differences(requested, stored, flexible)
    if problems:
        raise CheckpointError(f"{folder} does not fit this model: {'; '.join(problems)}")
    validate_sharding_integrity(by_rank)
    absent = {key for key in requested if key not in stored}
    _, kept = extract_matching_values(request, lambda value: getattr(value, "key", None) in absent)
    return kept


def _differences(requested: Shapes, stored: Shapes, flexible: set[str]) -> list[str]:
    missing = [key for key in requested if key not in stored and not _is_extra(key)]
    unexpected = [key for key in stored if key not in requested and not _is_extra(key)]
    shapes = [
        f"{key} {stored[key]} instead of {shape}"
        for key, shape in requested.items()
        if key in stored and key not in flexible and stored[key] != shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} keys are not in the checkpoint ({_some(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} keys are not in the model ({_some(unexpected)})")
    if shapes:
        problems.append(f"{len(shapes)} tensors have another shape ({_some(shapes)})")
    return problems


def _is_extra(key: str) -> bool:
    return key.endswith("._extra_state") or "._extra_state/" in key


def _some(items: list[str]) -> str:
    shown = ", ".join(sorted(items)[:_SHOWN])
    return shown if len(items) <= _SHOWN else f"{shown}, ..."
