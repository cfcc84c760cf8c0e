"""Keeps the random states of training apart from whatever else happens in its process.

Loading data and validating draw random numbers (torch's DataLoader takes one for every new
iterator). If training saw that, a resumed run, which makes its iterators anew, would not be the
uninterrupted one bit for bit.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker


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
