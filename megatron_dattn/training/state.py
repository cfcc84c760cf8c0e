"""The state of a training run: what a checkpoint saves and a resumed run restores."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_dattn.data.counters import LoaderCounters
from megatron_dattn.errors import CheckpointError

_OLDER_NAMES = {"visual_rows": "visual_tokens"}  # in checkpoints


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

    model: list[torch.nn.Module]
    """Model chunks of this pipeline rank, wrapped in megatron-core's DistributedDataParallel."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    loader: StatefulLoader | None = None
    """None on ranks that get their batches from another one (tensor-parallel ranks above 0)."""
    progress: Progress = field(default_factory=Progress)
    validation: dict[str, float] | None = None
    """The last validation: its `step` and its `loss`."""
