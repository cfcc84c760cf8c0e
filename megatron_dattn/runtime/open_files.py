"""Whether this process may open as many files as a run needs, found out before it needs them.

Where they run out, whoever comes next fails: a library while it connects the ranks, a loader that
forks its workers, a checkpoint. Measured with the recipe's model on one rank, the most open at a
time were 94 with no workers, 123 with 2, 145 with 4 and 194 with 8: two thirds of them belong to
the process groups of gloo, which also keeps a connection of each group to every other rank.
"""

import resource

from megatron_dattn.errors import ConfigError

_BASE = 128
_PER_WORKER = 16
_PER_RANK = 24
_USUAL = 4096


def open_files_needed(num_workers: int, world_size: int) -> int:
    """Descriptors that one rank of a run may have open at a time.

    Args:
        num_workers: loader processes of the rank.
    """
    return _BASE + _PER_WORKER * num_workers + _PER_RANK * (world_size - 1)


def require_open_files(needed: int) -> None:
    """Make sure that this process may open that many files, by raising its own limit if it can.

    Raises:
        ConfigError: the limit is lower and not this process's to raise.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _reaches(soft, needed):
        return
    if _reaches(hard, needed):
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return
    raise ConfigError(
        f"this process may have {hard} files open at a time (ulimit -n), but a rank of this run "
        f"needs up to {needed}: raise the limit before the start (ulimit -n {_USUAL}; LimitNOFILE "
        "of a service, --ulimit nofile of a container), or set fewer data.num_workers"
    )


def _reaches(limit: int, needed: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= needed
