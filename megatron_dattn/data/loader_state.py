"""The loader's state as bytes, and reading such bytes without running what is in them.

Energon's state is a tree of small dataclasses, integers and random number generator states. It is
pickled with tensors and arrays as plain bytes, and unpickled by a reader that knows exactly the
classes that occur: a checkpoint cannot make it call anything else.
"""

import dataclasses
import io
import pickle
from typing import Any

import numpy as np
import torch

from megatron_dattn.errors import CheckpointError

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
