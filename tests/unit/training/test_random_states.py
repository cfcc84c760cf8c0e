"""Random states of training stay apart from what is done in between."""

import random

import numpy as np
import pytest
import torch

from megatron_dattn.training.random_states import untouched_random_states


def _draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


@pytest.mark.parametrize("fails", [False, True])
def test_draws_inside_the_block_leave_no_trace(fails: bool) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = [_draw(), _draw()]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    found = [_draw()]
    try:
        with untouched_random_states():
            _draw()
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert [*found, _draw()] == expected
