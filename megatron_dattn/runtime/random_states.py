"""Captures and restores every random generator that a rank uses, as plain data.

Python's, NumPy's, torch's host and device generators, and the states of megatron-core's
tensor-parallel tracker. The bytes hold tensors, numbers and strings only.

`untouched_random_states` keeps those of training apart from whatever else happens in its process.
Loading data and validating draw random numbers (torch's DataLoader takes one for every new
iterator). If training saw that, a resumed run, which makes its iterators anew, would not be the
uninterrupted one bit for bit.
"""

import contextlib
import io
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def capture_rng() -> bytes:
    """The state of all generators of this process."""
    python_version, python_words, python_gauss = random.getstate()
    name, words, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": (python_version, torch.tensor(python_words, dtype=torch.int64), python_gauss),
        "numpy": (
            name,
            torch.from_numpy(np.asarray(words).astype(np.int64)),
            position,
            has_gauss,
            cached,
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": dict(get_cuda_rng_tracker().get_states()),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def restore_rng(data: bytes) -> None:
    """Put all generators of this process back; the inverse of `capture_rng`. Runs no code.

    Raises:
        ValueError: for bytes that `capture_rng` did not make; the generators are then undefined.
    """
    try:
        _restore(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged archive, or another one, may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"no random states: {reason}") from error


def _restore(state: dict[str, Any]) -> None:
    python_version, python_words, python_gauss = state["python"]
    random.setstate((python_version, tuple(python_words.tolist()), python_gauss))
    name, words, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    tracked = state["tracker"]
    if not isinstance(tracked, dict):
        raise ValueError(f"the tracker's are a {type(tracked).__name__}")
    get_cuda_rng_tracker().set_states(tracked)


@contextlib.contextmanager
def untouched_random_states() -> Iterator[None]:
    """Put every random state back as it was when the block is left."""
    states: list[tuple[Callable[[Any], object], Any]] = [
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
        (torch.set_rng_state, torch.get_rng_state()),
        (get_cuda_rng_tracker().set_states, get_cuda_rng_tracker().get_states()),
    ]
    if torch.cuda.is_available():
        states.append((torch.cuda.set_rng_state, torch.cuda.get_rng_state()))
    try:
        yield
    finally:
        for restore, state in states:
            restore(state)
