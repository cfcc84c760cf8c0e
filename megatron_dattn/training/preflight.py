"""What a run asks of its machines before the first step: links, clocks, devices.

One node that adds wrongly or is slow, or whose clock is off, spoils a run of a thousand, hours
later and without a name. What can be asked of all of them in about a second is asked here; that
settings, packages and data are the same everywhere is `start_facts.py`, that files are there and
disks have room is `checks.py`. What would make the run wrong ends it; what makes it slow or its
files oddly dated is a warning. Either names ranks and hosts.
"""

import logging
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dattn.errors import UserError
from megatron_dattn.runtime.distributed import (
    gather_from_all,
    get_device,
    host_group,
    is_rank_0,
    world_size,
)
from megatron_dattn.runtime.rank_errors import run_on_all_ranks
from megatron_dattn.runtime.rendezvous import spell_ranks

logger = logging.getLogger(__name__)

# Four MB: enough to go through every ring and tree that large messages take.
_LINK_VALUES = 2**20
_CLOCK_SECONDS = 5.0
"""Clocks kept by NTP differ by milliseconds; this much confuses whoever reads logs of two hosts."""
_SLOW = 1.25
"""A device that takes so many times the median is throttled, shared or broken."""
_SPEED_SIZE, _SPEED_ROUNDS = 4096, 16


@dataclass(frozen=True)
class _Machine:
    """What a rank says of itself."""

    host: str
    clock: float
    device: str
    product_seconds: float
    """Of a product of large matrices; 0 on a CPU, whose other work says nothing of the machine."""


def check_machines() -> None:
    """Try the links between all ranks, compare clocks and devices. Collective, once all have met.

    Raises:
        UserError: on all ranks, naming those where a sum over ranks comes out wrong.
        LostRankError: a rank does not answer (by `lost_ranks.named_lost_ranks` around this call).
    """
    if world_size() == 1:
        return
    run_on_all_ranks(_try_links)
    dist.barrier(group=host_group())  # so that all read their clocks at nearly the same moment
    own = _Machine(socket.gethostname(), time.time(), _device_name(), _product_seconds())
    machines = gather_from_all(own)
    if not is_rank_0():
        return
    for line in find_oddities(machines):
        logger.warning("%s", line)
    hosts = len({machine.host for machine in machines})
    logger.info(
        "%d ranks on %d %s: sums over their groups are right, clocks within %.2f s",
        len(machines),
        hosts,
        "host" if hosts == 1 else "hosts",
        _spread([machine.clock for machine in machines]),
    )


def _try_links() -> None:
    """Add up known numbers over every group that a step adds up over.

    Raises:
        UserError: a sum is wrong on this rank.
    """
    members = {name: dist.get_process_group_ranks(group) for name, group in _groups().items()}
    # All of them first: a rank that raised now would let those of its next group wait.
    sums = {name: _sum_is_right(group, members[name]) for name, group in _groups().items()}
    for name, is_right in sums.items():
        if not is_right:
            raise UserError(
                f"a sum over {name} ({spell_ranks(members[name])}) comes out wrong here: memory, "
                "network card or driver of this host is at fault. Start without it"
            )


def _groups() -> Mapping[str, dist.ProcessGroup]:
    world = dist.group.WORLD
    assert world is not None, "the ranks have met"
    return {
        "all ranks": world,
        "a tensor-parallel group": parallel_state.get_tensor_model_parallel_group(),
        "a context-parallel group": parallel_state.get_context_parallel_group(),
        "a pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "a data-parallel group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _sum_is_right(group: dist.ProcessGroup, ranks: Sequence[int]) -> bool:
    """In whole numbers, whose sum does not depend on its order: at most 1008 x 97 x 1024 ranks."""
    pattern = torch.arange(_LINK_VALUES, dtype=torch.int32, device=get_device()) % 1009
    total = pattern * _factor(dist.get_rank())
    dist.all_reduce(total, group=group)
    return torch.equal(total, pattern * sum(map(_factor, ranks)))


def _factor(rank: int) -> int:
    return rank % 97 + 1


def _device_name() -> str:
    device = get_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _product_seconds() -> float:
    """Seconds of a BF16 product of large matrices on this rank's GPU; 0 on a CPU."""
    device = get_device()
    if device.type != "cuda":
        return 0.0
    one = torch.ones(_SPEED_SIZE, _SPEED_SIZE, dtype=torch.bfloat16, device=device)

    def multiply() -> None:
        for _ in range(_SPEED_ROUNDS):
            torch.mm(one, one)
        torch.cuda.synchronize(device)

    multiply()  # loads the kernel, and the clock of an idle GPU rises
    return _seconds(multiply) / _SPEED_ROUNDS


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def find_oddities(machines: Sequence[_Machine]) -> list[str]:
    """Oddities that are no mistakes: one line for each kind, naming ranks and hosts."""
    clock = statistics.median(machine.clock for machine in machines)
    seconds = statistics.median(machine.product_seconds for machine in machines)
    usual = statistics.mode(machine.device for machine in machines)
    found: dict[str, list[str]] = {"clocks": [], "speeds": [], "devices": []}
    for rank, machine in enumerate(machines):
        where = f"rank {rank} (host {machine.host})"
        if abs(machine.clock - clock) > _CLOCK_SECONDS:
            found["clocks"].append(f"{where} by {machine.clock - clock:+.0f} s")
        if machine.product_seconds > _SLOW * seconds:
            times = machine.product_seconds / seconds
            found["speeds"].append(f"{where} takes {times:.2f} times as long")
        if machine.device != usual:
            found["devices"].append(f"{where} has {machine.device}")
    meanings = {
        "clocks": "clocks differ from the others', and dates in logs and files with them: {}; set "
        "them by NTP",
        "speeds": "GPUs slower than the median in a product of matrices, for which all others "
        "would wait at every step: {}; look at their clock rates, heat and other users",
        "devices": "other devices than the rest, which have {usual}: {}",
    }
    return [
        meanings[kind].format(_first_few(ranks), usual=usual)
        for kind, ranks in found.items()
        if ranks
    ]


def _first_few(items: Sequence[str], most: int = 8) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values)
