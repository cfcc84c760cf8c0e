"""Memory of this process, in bytes: what stands in for device memory statistics on the host."""

import resource
import sys

import psutil


def resident_bytes() -> int:
    """Resident set size of this process now."""
    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    """Largest resident set size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
    return max(peak, resident_bytes())  # the kernel updates the peak a little late
