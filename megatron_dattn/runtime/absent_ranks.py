"""One rank of a world whose other ranks do not exist: for shapes, not for values.

Collectives compare the shapes they are given, as a real one would have to, and return at once:
results keep what their memory held. With tensors on "meta" there is no memory either, so that a
laptop builds and runs any rank of a thousand. torch's own fake backend knows no "meta" tensors and
compares nothing.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch.futures import Future

from megatron_dattn.runtime.cpu import enable_cpu_runtime

_BACKEND = "absent"


def _done(result: Any = None) -> Any:
    """The handle of a collective that has ended."""
    future: Future = Future()
    future.set_result(result)
    return _create_work_from_future(future)


class AbsentRanks(dist.ProcessGroup):
    """A process group of one rank that is here and others that are not.

    torch calls these methods under other names in other releases, hence the second names.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size)  # type: ignore[call-arg]
        self._size = world_size
        self.calls = 0
        """Collectives so far; those of a coalesced call count as one."""

    def size(self) -> int:
        return self._size

    def getBackendName(self) -> str:
        return _BACKEND

    @property
    def group_name(self) -> str:  # type: ignore[override]
        return dist.distributed_c10d._world.pg_names[self]

    def _count(self, tensors: object, options: object = None, *more: object) -> Any:
        self.calls += 1
        return _done(tensors)

    allreduce = allreduce_coalesced = broadcast = reduce = send = recv = _count  # type: ignore[assignment]

    def barrier(self, opts: object = None) -> Any:
        return _done()

    def all_gather_single(self, whole: Tensor, own: Tensor, opts: object = None) -> Any:
        """Gather own [n, ...] into whole [ranks * n, ...], of one dtype."""
        self._compare("an all-gather", whole, own)
        return self._count(whole)

    def reduce_scatter_single(self, own: Tensor, whole: Tensor, opts: object = None) -> Any:
        """Reduce whole [ranks * n, ...] into own [n, ...], of one dtype."""
        self._compare("a reduce-scatter", whole, own)
        return self._count(own)

    def all_gather_single_coalesced(
        self, wholes: Sequence[Tensor], owns: Sequence[Tensor], opts: object = None
    ) -> Any:
        """All-gathers [n, ...] to [ranks * n, ...], each of one dtype."""
        for whole, own in zip(wholes, owns, strict=True):
            self._compare("an all-gather", whole, own)
        return self._count(wholes)

    def reduce_scatter_single_coalesced(
        self, owns: Sequence[Tensor], wholes: Sequence[Tensor], opts: object = None
    ) -> Any:
        """Reduce-scatters [ranks * n, ...] to [n, ...], each of one dtype."""
        for whole, own in zip(wholes, owns, strict=True):
            self._compare("a reduce-scatter", whole, own)
        return self._count(owns)

    _allgather_base = all_gather_single  # type: ignore[assignment]
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]
    allgather_into_tensor_coalesced = all_gather_single_coalesced  # type: ignore[assignment]
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # type: ignore[assignment]

    def _compare(self, what: str, whole: Tensor, own: Tensor) -> None:
        if whole.numel() != self._size * own.numel() or whole.dtype != own.dtype:
            raise ValueError(
                f"{what} over {self._size} ranks joins {list(own.shape)} {own.dtype} of each to "
                f"{list(whole.shape)} {whole.dtype}"
            )


def _create(store: object, rank: int, world_size: int, timeout: object) -> AbsentRanks:
    return AbsentRanks(rank, world_size)


@contextlib.contextmanager
def absent_ranks(
    rank: int, world_size: int, *, tensor_parallel: int = 1, pipeline_parallel: int = 1
) -> Iterator[AbsentRanks]:
    """The world of `world_size` ranks as this one sees it, with megatron-core's groups.

    Its device is "meta". No process group may exist yet; none is left. Needs the CPU runtime, so a
    machine whose GPUs are hidden or that has none.
    """
    assert not dist.is_initialized(), "this process has a world of its own already"
    enable_cpu_runtime()
    from megatron.core import parallel_state

    if _BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(_BACKEND, _create, devices=["cpu"])
    dist.init_process_group(_BACKEND, store=dist.HashStore(), rank=rank, world_size=world_size)
    former = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment,return-value]
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_parallel,
            pipeline_model_parallel_size=pipeline_parallel,
            create_gloo_process_groups=False,
        )
        yield dist.group.WORLD  # type: ignore[misc]
    finally:
        torch.cuda.current_device = former
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
