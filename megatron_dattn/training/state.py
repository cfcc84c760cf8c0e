"""The state of a training run, what of it a checkpoint holds, and how it gets back into a run.

Weights, optimizer and schedule are sharded as megatron-core does it; random states and the loader's
place are files of their own, one per rank that has them; counters are plain JSON.
"""

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, StateDict
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model

from megatron_dattn.data.skipped_samples import LoaderCounters
from megatron_dattn.errors import CheckpointError, UserError
from megatron_dattn.models.added_parameters import comes_with_preset
from megatron_dattn.runtime.distributed import rank
from megatron_dattn.runtime.random_states import capture_rng, restore_rng
from megatron_dattn.training.optimizer import restore_optimizer, sharded_optimizer_state
from megatron_dattn.training.stages import module_of_parameter

_OLDER_NAMES = {"visual_rows": "visual_tokens"}  # in checkpoints
_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# The distributed optimizer's state is stored as if it were not distributed, by flat_state.py: it
# loads under any tensor-, pipeline- and data-parallel size.
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass
class Progress:
    """Counters since the start of the stage, over all data-parallel ranks. Plain JSON."""

    step: int = 0
    """Completed steps, the skipped ones included."""
    consumed_samples: int = 0
    consumed_packs: int = 0
    text_tokens: int = 0
    visual_tokens: int = 0
    skipped_samples: int = 0
    """Samples that the loader could not use."""
    fixed_problems: int = 0
    """Problems of used samples that the loader fixed."""
    skipped_steps: int = 0
    """Steps without an update because the loss or a gradient was not finite."""
    skipped_steps_in_a_row: int = 0

    def to_json(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        """The inverse of `to_json`; counters that an older version did not know start at 0.

        Raises:
            CheckpointError: for a counter that this version does not know or that is no integer.
        """
        values = {_OLDER_NAMES.get(name, name): value for name, value in values.items()}
        unknown = values.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown or not all(type(value) is int for value in values.values()):
            raise CheckpointError(
                f"the checkpoint's progress {values} is not understood; resume it with the "
                "version that wrote it"
            )
        return cls(**values)


class StatefulLoader(Protocol):
    """A loader whose place in the data can be saved and restored."""

    def __iter__(self) -> Iterator[Any]: ...

    def save_state(self) -> bytes: ...

    def restore_state(self, state: bytes) -> None: ...

    def counters(self) -> LoaderCounters: ...


@dataclass
class TrainState:
    """Everything that changes while training, on this rank."""

    chunks: list[DistributedDataParallel]
    """This rank's share of the model, wrapped for training: one piece, or several where pipeline
    stages are interleaved."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    loader: StatefulLoader | None = None
    """None on ranks that get their packs from another one: one of a data-parallel replica loads."""
    progress: Progress = field(default_factory=Progress)
    validation: dict[str, float] | None = None
    """The last validation: its `step` and its `loss`."""

    @property
    def model(self) -> DistributedDataParallel:
        """The first chunk, which on the first pipeline stage has encoder and adapter; all of this
        rank's model where pipeline stages are not interleaved."""
        return self.chunks[0]


def rng_file() -> str:
    """Name of this rank's random states."""
    return f"rng-{rank():05d}.pt"


def loader_file(data_parallel_rank: int | None = None) -> str:
    """Name of the loader's place, of this data-parallel rank where none is given."""
    if data_parallel_rank is None:
        data_parallel_rank = parallel_state.get_data_parallel_rank()
    return f"loader-dp-{data_parallel_rank:05d}.bin"


def local_files(state: TrainState) -> dict[str, bytes]:
    """Files that this rank adds to the shards: its random states, and one loader per data rank."""
    local = {rng_file(): capture_rng()}
    if state.loader is not None:
        local[loader_file()] = state.loader.save_state()
    return local


def check_finite(chunks: Sequence[DistributedDataParallel]) -> None:
    """Raises CheckpointError for a parameter with an infinite value or none."""
    # A sum over such a value is not finite either: one pass, without tensors of the same size, and
    # one wait for the device. Finite values may have a sum that is not, so that proves nothing.
    named = [pair for chunk in chunks for pair in chunk.named_parameters()]
    sums = [parameter.detach().sum(dtype=torch.float32) for _, parameter in named]
    if torch.stack(sums).isfinite().all():
        return
    for name, parameter in named:
        if not torch.isfinite(parameter).all():
            raise CheckpointError(f"parameter {name} is not finite: the state is not saved")


def model_state(chunks: Sequence[DistributedDataParallel]) -> ShardedStateDict:
    """The weights alone, as megatron-core shards them."""
    return {
        _chunk_name(number): unwrap_model(chunk).sharded_state_dict(metadata=dict(_SHARDING))
        for number, chunk in enumerate(chunks)
    }


def _chunk_name(number: int) -> str:
    """Nothing of it is stored: tensors go by their names in the whole model."""
    return f"model{number or ''}"


def sharded_state(state: TrainState, *, is_loading: bool) -> ShardedStateDict:
    """Weights and optimizer; to be saved, the schedule too, which is plain."""
    sharded = model_state(state.chunks)
    sharded["optimizer"] = sharded_optimizer_state(
        state.optimizer, copy.copy(sharded), is_loading=is_loading, metadata=dict(_SHARDING)
    )
    if not is_loading:
        sharded["scheduler"] = state.scheduler.state_dict()
        sharded["content_metadata"] = dict(_SHARDING)
    return sharded


def restore_state(
    state: TrainState, loaded: StateDict, local: Mapping[str, bytes], path: Path
) -> None:
    """Hand what was loaded from `path`, and this rank's own files, to the run.

    Raises:
        CheckpointError: the weights or the schedule do not fit the run's, or a part is missing or
            damaged.
    """
    missing = [name for name in ("optimizer", "scheduler") if name not in loaded]
    if missing:
        raise CheckpointError(f"{path} does not hold the state of {' and '.join(missing)}")
    load_modules(state.chunks, loaded, None)
    with _one_error(f"{path} does not hold this optimizer's state"):
        restore_optimizer(state.optimizer, loaded["optimizer"])
    state.scheduler.num_steps = 0  # loading adds the saved steps to those already made
    try:
        with _one_error(f"{path} does not hold this schedule's state"):
            state.scheduler.load_state_dict(loaded["scheduler"])
    except AssertionError as error:  # megatron-core's way to refuse another schedule
        raise CheckpointError(
            f"{path} was trained with another learning-rate schedule: {error}; resume with the "
            "same optimizer settings and training.train_iters"
        ) from error
    if "rng" in local:
        with _one_error(f"{path / rng_file()} is none of ours"):
            restore_rng(local["rng"])
    if state.loader is not None:
        with _one_error(f"{path / loader_file()} does not hold this loader's place"):
            state.loader.restore_state(local["loader"])


@contextlib.contextmanager
def _one_error(meaning: str) -> Iterator[None]:
    """Say what it means that a stored state has other parts, or parts of other types, than ours.

    Sums have proved that a file is as it was written, not that this program wrote it.
    """
    try:
        yield
    except UserError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{meaning}: {type(error).__name__}: {error}") from error


def added_parameters(chunks: Sequence[DistributedDataParallel], absent: set[str]) -> dict[str, int]:
    """Sizes of what the preset adds to the modules that are there, by name; layers together."""
    sizes: dict[str, int] = {}
    parameters = (pair for chunk in chunks for pair in unwrap_model(chunk).named_parameters())
    for name, parameter in parameters:
        if comes_with_preset(name) and name.partition(".")[0] not in absent:
            every = _LAYER_NUMBER.sub("*", name)
            sizes[every] = sizes.get(every, 0) + parameter.numel()
    return sizes


def load_modules(
    chunks: Sequence[DistributedDataParallel],
    loaded: StateDict,
    modules: Sequence[str] | None,
    plain: bool = False,
) -> None:
    """Hand loaded values to the modules.

    Args:
        modules: whose values must all be there; of every module where None.
        plain: but for what the attention preset adds.

    Raises:
        CheckpointError: some are missing, or there are others.
    """
    results = [
        unwrap_model(chunk).load_state_dict(loaded.get(_chunk_name(number), {}), strict=False)
        for number, chunk in enumerate(chunks)
    ]
    unexpected = [key for result in results for key in result.unexpected_keys]
    missing = [
        key
        for result in results
        for key in result.missing_keys
        if not key.endswith("_extra_state")
        and (modules is None or module_of_parameter(key) in modules)
        and not (plain and comes_with_preset(key))
    ]
    if missing or unexpected:
        raise CheckpointError(
            f"the weights do not fit the model: missing {missing}, unexpected {unexpected}"
        )
