"""Ranks of a group that speaks through a device exchange host tensors over gloo."""

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg  # registers the backend "fake"

from megatron_dattn.runtime.host_group import host_group
from tests.support.distributed import run_distributed

assert fake_pg


def exchange() -> tuple[bool, int, bool]:
    """Over twins of two groups of two ranks, whose own backend moves nothing."""
    pairs = [dist.new_group(ranks, backend="fake") for ranks in ([0, 1], [2, 3])]
    mine = pairs[dist.get_rank() // 2]
    number = torch.tensor([10 ** dist.get_rank()])
    dist.all_reduce(number, group=host_group(mine))
    return host_group() is dist.group.WORLD, int(number), host_group(mine) is host_group(mine)


def test_each_group_has_one_twin_of_its_own_ranks() -> None:
    first, second, third, fourth = run_distributed(exchange, 4)
    assert first == second == (True, 11, True)
    assert third == fourth == (True, 1100, True)
