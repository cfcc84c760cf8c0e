"""Every generator continues after restoring exactly as it did after capturing."""

import random

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_dattn.checkpoint.rng import capture_rng, restore_rng


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
