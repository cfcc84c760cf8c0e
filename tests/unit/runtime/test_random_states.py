"""Every generator continues where it was, after restoring and after a block that draws."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_dattn.runtime.distributed import one_process, seed_everything
from megatron_dattn.runtime.random_states import (
    capture_rng,
    restore_rng,
    untouched_random_states,
)


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with one_process():
        seed_everything(1)
        yield


def draw() -> tuple:
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(3).tolist()
    return random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist(), inside


def test_all_generators_continue() -> None:
    draw()  # leaves half of a pair of Gaussian numbers cached in Python's and NumPy's states
    state = capture_rng()
    expected = [draw(), draw()]
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert [draw(), draw()] != expected
    restore_rng(state)
    assert [draw(), draw()] == expected


def test_capturing_draws_nothing() -> None:
    state = capture_rng()
    assert capture_rng() == state


@pytest.mark.parametrize("fails", [False, True])
def test_draws_inside_the_block_leave_no_trace(fails: bool) -> None:
    state = capture_rng()
    expected = [draw(), draw()]
    restore_rng(state)
    found = [draw()]
    try:
        with untouched_random_states():
            draw()
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert [*found, draw()] == expected
