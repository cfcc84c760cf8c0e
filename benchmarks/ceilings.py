"""What this machine can do at most, measured: a large matrix product and a large copy.

Data sheets promise more than any program reaches, and shared or throttled machines keep even less
of it, so bounds are computed from what the same process measures just before its first round.
"""

from functools import partial

import torch

from benchmarks.protocol import Timer
from benchmarks.roofline import Machine

_PRODUCT_SIDE = {"cuda": 8192, "cpu": 2048}
_COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}
_REPEATS = 10


def measure_machine(device: torch.device, dtype: torch.dtype, timer: Timer) -> Machine:
    """The best of several runs of each, in the run's dtype. Takes a second or two."""
    side, size = _PRODUCT_SIDE[device.type], _COPY_BYTES[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.ones(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    # A weight is stored transposed, and some machines multiply that faster.
    product_seconds = min(
        timer(partial(torch.mm, left, order, out=product))
        for order in (right, right.T)
        for _ in _attempts()
    )
    copy_seconds = min(timer(lambda: target.copy_(source)) for _ in _attempts())
    return Machine(2 * side**3 / product_seconds, 2 * size / copy_seconds)


def describe(machine: Machine, dtype: torch.dtype) -> str:
    """Both ceilings for the header."""
    flops, moved = machine.flops_per_second / 1e12, machine.bytes_per_second / 1e9
    name = str(dtype).removeprefix("torch.")
    return f"ceilings measured first: {flops:.3g} TFLOP/s ({name} product), {moved:.3g} GB/s (copy)"


def _attempts() -> range:
    return range(_REPEATS)
