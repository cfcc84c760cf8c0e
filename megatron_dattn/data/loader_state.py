"""The loader's state as bytes, and reading such bytes without running what is in them.

A state is plain data with arrays of positions; older ones hold Energon's, a tree of small
dataclasses and random number generator states. It is pickled with arrays as plain bytes, and
unpickled by a reader that knows exactly the classes that occur: a checkpoint cannot make it call
anything else.

What every rank of a run stored can be dealt anew to another number of ranks and loader processes.
"""

import dataclasses
import io
import pickle
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_dattn.data.places import StreamPlace, deal_anew
from megatron_dattn.data.skipped_samples import LoaderCounters
from megatron_dattn.errors import CheckpointError

STATE_VERSION = 3
ENERGONS_VERSION = 2  # whose place is Energon's state, read by older_loader_state.py

RANK, RANKS, WORKERS = "data-parallel rank", "data-parallel size", "data.num_workers"
"""What a state says of the streams whose places it holds."""

_STATE_CLASSES = {
    "megatron.energon.savable_loader": (
        "SavableDataLoaderState",
        "SavableDatasetCheckpoint",
        "SavableDatasetState",
    ),
    "megatron.energon.state": ("FlexState",),
    "megatron.energon.rng": ("SystemRngState",),
    "collections": ("OrderedDict",),
    __name__: ("_tensor_from_bytes", "_array_from_bytes"),
}
# Names of ours that older versions stored: of a class that Energon compares, and of a reason that
# the counters know.
_RENAMED = {"TrainingRows": "TrainingRecords", "bad_row": "bad_record"}


def make_state(
    identity: dict[str, Any], counters: LoaderCounters, places: Sequence[StreamPlace]
) -> dict[str, Any]:
    """A rank's state, of what must be the same to go on from it.

    Args:
        places: of its streams, the one that gives the next pack first.
    """
    return {
        "version": STATE_VERSION,
        "identity": identity,
        "counters": counters.as_dict(),
        "places": [dataclasses.asdict(place) for place in places],
    }


def places_of(state: dict[str, Any]) -> list[StreamPlace]:
    """The places that a state holds."""
    return [StreamPlace(**place) for place in state["places"]]


def deal_states_anew(states: Sequence[bytes], num_ranks: int, num_workers: int) -> list[bytes]:
    """The states of a run's ranks, dealt to as many ranks and loader processes as there are now.

    Every sample that none of the old ones has given out is given out by one of the new ones. What
    was counted is the first rank's from now on: only sums over ranks are looked at.

    Args:
        states: of all data-parallel ranks, by rank.

    Raises:
        CheckpointError: they are damaged, of different runs, or by a version that dealt otherwise.
    """
    olds = [load_state(state) for state in states]
    if any(not isinstance(old, dict) or old.get("version") != STATE_VERSION for old in olds):
        raise CheckpointError(
            "the data loader's state was saved by a version that could not change the data-"
            "parallel size or data.num_workers; resume once with those of the checkpoint, and "
            "change them after the next one is saved"
        )
    identity = olds[0]["identity"]
    expected = [identity | {RANK: rank, RANKS: len(olds)} for rank in range(len(olds))]
    if [old["identity"] for old in olds] != expected:
        raise CheckpointError(
            f"the {len(olds)} states of the data loaders are not those of one run's ranks"
        )
    per_rank = max(1, num_workers)
    old_places = [place for old in olds for place in places_of(old)]
    places = deal_anew(old_places, num_ranks * per_rank)
    skipped: Counter[str] = Counter()
    for old in olds:
        skipped.update(old["counters"]["skipped"])
    counters = [LoaderCounters() for _ in range(num_ranks)]
    counters[0] = LoaderCounters(sum(old["counters"]["seen"] for old in olds), dict(skipped))
    return [
        dump_state(
            make_state(
                identity | {RANK: rank, RANKS: num_ranks, WORKERS: num_workers},
                counters[rank],
                places[rank * per_rank : (rank + 1) * per_rank],
            )
        )
        for rank in range(num_ranks)
    ]


def dump_state(state: Any) -> bytes:
    """Pickle a loader's state."""
    buffer = io.BytesIO()
    _StatePickler(buffer, protocol=5).dump(state)
    return buffer.getvalue()


def load_state(data: bytes) -> Any:
    """Read what `dump_state` wrote.

    Raises:
        CheckpointError: the bytes are damaged or name a class that a loader state never holds.
    """
    try:
        return _with_current_names(_StateUnpickler(io.BytesIO(data)).load())
    except CheckpointError:
        raise
    except Exception as error:
        # Damaged bytes can make pickle raise almost anything.
        raise CheckpointError(f"the data loader's state is damaged: {error}") from error


def _with_current_names(value: Any) -> Any:
    if isinstance(value, str):
        return _RENAMED.get(value, value)
    if isinstance(value, dict):
        renamed = {_with_current_names(key): _with_current_names(v) for key, v in value.items()}
        return type(value)(renamed)
    if isinstance(value, list):
        return [_with_current_names(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            setattr(value, field.name, _with_current_names(getattr(value, field.name)))
    return value


def _tensor_from_bytes(data: bytes, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(_array_from_bytes(data, dtype, shape))


def _array_from_bytes(data: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(data, dtype=np.dtype(dtype)).reshape(shape).copy()


class _StatePickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            array = value.numpy()
            return _tensor_from_bytes, (array.tobytes(), array.dtype.str, array.shape)
        if isinstance(value, np.ndarray):
            return _array_from_bytes, (value.tobytes(), value.dtype.str, value.shape)
        return NotImplemented


class _StateUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _STATE_CLASSES.get(module, ()):
            raise CheckpointError(
                f"the data loader's state names {module}.{name}, which no loader state holds; "
                "do not use this file"
            )
        return super().find_class(module, name)
