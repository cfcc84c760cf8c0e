"""Groups of ranks for what only the host needs to know: flags, sizes, plans.

Through NCCL such numbers would go to the device and back, and the host would wait until the device
has done all work before them.
"""

from datetime import timedelta

import torch.distributed as dist

_twins: dict[dist.ProcessGroup, dist.ProcessGroup] = {}
_timeout: timedelta | None = None


def set_host_timeout(timeout: timedelta) -> None:
    """Let collectives of groups that are made from now on wait so long for a lost rank."""
    global _timeout
    _timeout = timeout


def host_group(group: dist.ProcessGroup | None = None) -> dist.ProcessGroup:
    """The same ranks over gloo, for tensors in host memory; collective over them at the first call.

    Args:
        group: the world where None; itself where its backend is gloo.
    """
    group = dist.group.WORLD if group is None else group
    assert group is not None, "the ranks have met"
    if dist.get_backend(group) == dist.Backend.GLOO:
        return group
    if group not in _twins:
        _twins[group] = dist.new_group(
            dist.get_process_group_ranks(group),
            timeout=_timeout,
            backend=dist.Backend.GLOO,
            use_local_synchronization=True,  # the ranks of other groups are not there to join
        )
    return _twins[group]
