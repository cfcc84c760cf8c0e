"""Reading a loader's state never runs code."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dattn.data.loader_state import dump_state, load_state
from megatron_dattn.errors import CheckpointError


class Payload:
    """What an attacker would put into a checkpoint."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> object:
        return Path.touch, (self.marker,)


def test_tensors_and_arrays_survive() -> None:
    state = {"t": torch.arange(6).reshape(2, 3), "a": np.arange(4, dtype=np.uint32), "n": (1, "x")}
    loaded = load_state(dump_state(state))
    assert torch.equal(loaded["t"], state["t"])  # type: ignore[arg-type]
    assert np.array_equal(loaded["a"], state["a"])  # type: ignore[arg-type]
    assert loaded["n"] == (1, "x")


def test_foreign_classes_are_refused_and_nothing_runs(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    data = pickle.dumps({"energon": Payload(marker)})
    with pytest.raises(CheckpointError, match="no loader state holds"):
        load_state(data)
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists()  # it would have run


@pytest.mark.parametrize("data", [b"", b"garbage", dump_state({"a": np.arange(9)})[:-20]])
def test_damaged_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        load_state(data)
