"""Peak speed of known GPUs, the denominator of MFU: makers' data sheets, without sparsity."""

import torch

# Name as torch reports it (the first entry contained in it counts) -> BF16 tensor-core FLOP/s.
_BF16_PEAKS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
)


def bf16_peak(device_name: str) -> float | None:
    """Dense BF16 FLOP/s of a GPU model, None for one that is not in the table."""
    return next((peak for name, peak in _BF16_PEAKS if name in device_name), None)


def device_peak(precision: str) -> float | None:
    """FLOP/s that MFU is measured against on this rank's device; None where it has no meaning.

    FP8 runs are measured against the BF16 peak too: only some of their products are FP8, and the
    figure stays comparable. FP32 runs and CPUs have none.
    """
    if precision != "bf16" or not torch.cuda.is_available():
        return None
    return bf16_peak(torch.cuda.get_device_name())
