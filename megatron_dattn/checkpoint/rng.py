"""Captures and restores every random generator that a rank uses, as plain data.

Python's, NumPy's, torch's host and device generators, and the states of megatron-core's
tensor-parallel tracker. The bytes hold tensors, numbers and strings only.
"""

import io
import random
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
    """Put all generators of this process back; the inverse of `capture_rng`.

    Raises:
        ValueError, KeyError, RuntimeError: for bytes that `capture_rng` did not make.
    """
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    python_version, python_words, python_gauss = state["python"]
    random.setstate((python_version, tuple(python_words.tolist()), python_gauss))
    name, words, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
