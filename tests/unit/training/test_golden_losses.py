"""Losses of a fixed run are those of the file, so that no change moves them unnoticed.

The other tests compare one way of computing with another and would follow a change of both.
"""

import json

import pytest

from tests.support.distributed import run_distributed
from tests.support.golden import FILE, PRESETS, losses_of

# Another CPU, or another version of torch, sums in another order: each FP32 sum is then off by some
# 1e-7 of its size, and 20 steps of the optimizer carry that on. Between the kernels "math" and
# "cpu_flash", which differ as much as two machines, it was 2e-7 at most. A learning rate that is
# 1 % higher moves a loss by 2e-4.
TOLERANCE = 1e-5


@pytest.mark.parametrize("preset", PRESETS)
def test_losses_are_those_of_the_file(preset: str) -> None:
    expected = json.loads(FILE.read_text())[preset]
    (found,) = run_distributed(losses_of, 1, preset)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=TOLERANCE), (
            f"the {name} of {preset} is not that of {FILE.name}; if it is meant to move, write the "
            "file anew with `python -m tests.support.golden` and say why in the commit message"
        )
