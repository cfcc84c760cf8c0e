"""Counts the messages of a training step on the CPU, as a device's network would see them."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# By c10d's operations. What is called as one ("coalesced") is one message of several tensors.
_KINDS = {
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
}
# How often all but one rank's share of a tensor go round the ring.
_PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}


class Collectives(TorchDispatchMode):
    """While entered, counts in `found` what goes between the ranks of a group, by kind, and in
    `sent` the bytes that a ring sends for it from each rank.

    Of forward and backward passes alike. Groups of one rank send nothing.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self._group = group

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operation.namespace == "c10d" and self._is_ours(args):
            name = operation.overloadpacket.__name__
            kind = _KINDS.get(name, name)
            self.found[kind] += 1
            if kind in _PASSES:
                ranks = self._group.size()
                # The larger of what goes in and what comes out: all of it, not one rank's share.
                whole = max(_num_bytes(argument) for argument in args)
                self.sent[kind] += _PASSES[kind] * (ranks - 1) * whole // ranks
        return operation(*args, **(kwargs or {}))

    def _is_ours(self, args: Any) -> bool:
        boxed = [value for value in args if isinstance(value, torch.ScriptObject)]
        names = {
            dist.ProcessGroup.unbox(value).group_name
            for value in boxed
            if value._type().name() == "ProcessGroup"  # beside it stands the operator of a sum
        }
        return self._group.group_name in names


def _num_bytes(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    return sum(map(_num_bytes, argument)) if isinstance(argument, list | tuple) else 0
