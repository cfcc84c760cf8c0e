"""Start and end of a distributed run: process group, model-parallel groups, seeds.

Works under the launchers that `launcher.py` knows and, without one, as a world of one process. NCCL
on CUDA, gloo with the CPU runtime otherwise.
"""

import contextlib
import random
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_dattn.errors import ConfigError
from megatron_dattn.runtime.cpu import enable_cpu_runtime
from megatron_dattn.runtime.launcher import Launch, read_launch
from megatron_dattn.runtime.lost_ranks import introduce_rank
from megatron_dattn.runtime.rendezvous import RendezvousError, meet

T = TypeVar("T")

# What `host_group` makes: a group's twin over gloo, and how long its collectives wait.
_host_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}
_host_timeout: timedelta | None = None


def initialize_distributed(
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
    timeout_seconds: float = 600.0,
    rendezvous_seconds: float = 600.0,
) -> None:
    """Join the process group and build megatron-core's model- and data-parallel groups.

    A process group that exists already is used as it is. The sizes are checked before any
    communication, so a wrong one fails at once on every rank.

    Args:
        timeout_seconds: how long a collective may wait for a lost rank before it raises.
        rendezvous_seconds: how long to wait at the start until all ranks have met.

    Raises:
        ConfigError: if the sizes do not divide the world, this rank has no CUDA device, or what the
            launcher says does not add up.
        RendezvousError: the ranks did not meet.
    """
    check_parallel_sizes(
        dist.get_world_size() if dist.is_initialized() else read_launch().world_size,
        tensor_model_parallel_size,
        pipeline_model_parallel_size,
        context_parallel_size,
    )
    enable_cpu_runtime()
    join_world(timeout_seconds=timeout_seconds, rendezvous_seconds=rendezvous_seconds)

    from megatron.core import parallel_state  # after the CPU runtime had its say

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        context_parallel_size=context_parallel_size,
        distributed_timeout_minutes=timeout_seconds / 60,
    )


def join_world(*, timeout_seconds: float = 600.0, rendezvous_seconds: float = 600.0) -> None:
    """Join the process group of all ranks, if there is none yet. Collective.

    Raises:
        ConfigError: this rank has no CUDA device, or what the launcher says does not add up.
        RendezvousError: the ranks did not meet.
    """
    launch = read_launch()
    if torch.cuda.is_available():
        _select_cuda_device(launch)
    if not dist.is_initialized():
        _join_process_group(launch, timeout_seconds, rendezvous_seconds)


def check_parallel_sizes(
    world_size: int, tensor_parallel: int, pipeline_parallel: int, context_parallel: int = 1
) -> int:
    """The data-parallel size that these sizes leave.

    Raises:
        ConfigError: if a size is below one or their product does not divide the world size.
    """
    sizes = {
        "tensor_model_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": pipeline_parallel,
        "context_parallel_size": context_parallel,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} is {size}; it must be at least 1")
    product = tensor_parallel * pipeline_parallel * context_parallel
    if world_size % product:
        if context_parallel == 1:
            del sizes["context_parallel_size"]
        spelled = " x ".join(f"{name} {size}" for name, size in sizes.items())
        below = world_size - world_size % product
        nearest = " or ".join(str(fit) for fit in (below, below + product) if fit)
        raise ConfigError(
            f"{spelled} = {product} does not divide the world size {world_size}; start a multiple "
            f"of {product} processes, {nearest} (torchrun --nproc-per-node), or lower the sizes"
        )
    return world_size // product


def _select_cuda_device(launch: Launch) -> None:
    local_rank, devices = launch.local_rank, torch.cuda.device_count()
    if devices == 1 and launch.launcher == "srun":
        local_rank = 0  # srun can show each task a GPU of its own: --gpus-per-task, --gpu-bind
    if local_rank >= devices:
        raise ConfigError(
            f"local rank {local_rank} has no CUDA device: this machine shows {devices}; start at "
            f"most {devices} processes per node (torchrun --nproc-per-node {devices})"
        )
    torch.cuda.set_device(local_rank)


def _join_process_group(launch: Launch, timeout_seconds: float, rendezvous_seconds: float) -> None:
    global _host_timeout
    on_cuda = torch.cuda.is_available()
    backend = "nccl" if on_cuda else "gloo"
    # One process needs no port: a store in its own memory will do.
    store = meet(launch, rendezvous_seconds) if launch.world_size > 1 else dist.HashStore()
    timeout = timedelta(seconds=timeout_seconds)
    store.set_timeout(timeout)
    _host_timeout = timeout
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
            # Named, NCCL connects here and not in the first collective, and barriers need no guess.
            device_id=get_device() if on_cuda else None,
        )
        if launch.world_size > 1:
            introduce_rank()
    except (dist.DistError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RendezvousError(
            f"rank {launch.rank} met the others, but {backend} cannot connect to them: {reason}; "
            f"{backend.upper()}_SOCKET_IFNAME names the network interface to use"
        ) from error


def destroy_distributed() -> None:
    """Tear down what `initialize_distributed` built; does nothing if nothing was."""
    if _has_model_parallel_groups():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _has_model_parallel_groups() -> bool:
    from megatron.core import parallel_state

    return parallel_state.model_parallel_is_initialized()


@contextlib.contextmanager
def world_of_one() -> Iterator[None]:
    """A process group of this process alone, for work on one; a group that exists already stays.

    Raises:
        ConfigError: a launcher has started several processes.
    """
    existed = dist.is_initialized()
    if read_launch().world_size > 1 or world_size() > 1:
        raise ConfigError("this is work for one process; start it without torchrun, srun or mpirun")
    try:
        join_world()
        yield
    finally:
        if not existed:
            destroy_distributed()


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """`world_of_one` with the groups and random states that a model of megatron-core needs."""
    with world_of_one():
        if not _has_model_parallel_groups():
            initialize_distributed()
        seed_everything(0)
        yield


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, torch and megatron-core's tensor-parallel random states.

    Pipeline stages get different streams, tensor-parallel ranks differ only inside the tracker's
    model-parallel regions, data- and context-parallel ranks agree.
    """
    from megatron.core import parallel_state, tensor_parallel

    pipeline_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(pipeline_seed)
    np.random.seed(pipeline_seed % 2**32)
    torch.manual_seed(pipeline_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(pipeline_seed)


def get_device() -> torch.device:
    """The device of this rank's tensors."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def rank() -> int:
    """Of this process in the world; 0 before the world exists."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of all ranks; 1 before the world exists."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank_0() -> bool:
    """True if this is the first rank of the world (also true before the world exists)."""
    return rank() == 0


def gather_from_all(value: T) -> list[T]:
    """This value of every rank, by rank, on every rank. Collective."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_on_first_rank(value: T) -> list[T]:
    """This value of every rank, by rank, on rank 0; an empty list on the others. Collective."""
    if world_size() == 1:
        return [value]
    values: list[T] | None = [value] * world_size() if rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=host_group())
    return values or []


def host_group(group: dist.ProcessGroup | None = None) -> dist.ProcessGroup:
    """The same ranks over gloo, for what only the host needs to know: flags, sizes, plans.

    Through NCCL such numbers would go to the device and back, and the host would wait until the
    device has done all work before them. Collective over the group at the first call.

    Args:
        group: the world where None; itself where its backend is gloo.
    """
    group = dist.group.WORLD if group is None else group
    assert group is not None, "the ranks have met"
    if dist.get_backend(group) == dist.Backend.GLOO:
        return group
    if group not in _host_groups:
        _host_groups[group] = dist.new_group(
            dist.get_process_group_ranks(group),
            timeout=_host_timeout,
            backend=dist.Backend.GLOO,
            use_local_synchronization=True,  # the ranks of other groups are not there to join
        )
    return _host_groups[group]
