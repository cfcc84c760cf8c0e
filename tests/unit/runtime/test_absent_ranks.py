"""A world of one rank: groups are those of the real one, messages are compared and not sent."""

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dattn.runtime.absent_ranks import AbsentRanks, absent_ranks

META = torch.device("meta")


def test_groups_are_those_of_the_whole_world() -> None:
    with absent_ranks(517, 1024, tensor_parallel=8, pipeline_parallel=4) as world:
        assert (world.size(), dist.get_rank(), dist.get_world_size()) == (1024, 517, 1024)
        assert parallel_state.get_tensor_model_parallel_rank() == 5
        assert parallel_state.get_pipeline_model_parallel_rank() == 2
        assert parallel_state.get_data_parallel_rank() == 0
        assert parallel_state.get_data_parallel_world_size() == 32
        group = parallel_state.get_tensor_model_parallel_group()
        assert dist.get_process_group_ranks(group) == list(range(512, 520))
        assert torch.cuda.current_device() == META
    assert not dist.is_initialized()


def test_messages_of_meta_tensors_pass() -> None:
    with absent_ranks(3, 4, tensor_parallel=4):
        group = parallel_state.get_tensor_model_parallel_group()
        assert isinstance(group, AbsentRanks)
        own, whole = torch.empty(2, 3, device=META), torch.empty(8, 3, device=META)
        dist.all_reduce(own, group=group)
        dist.broadcast(own, src=0, group=group)
        dist.all_gather_into_tensor(whole, own, group=group)
        dist.reduce_scatter_tensor(own, whole, group=group, async_op=True).wait()
        with dist._coalescing_manager(group):
            dist.all_gather_into_tensor(whole, own, group=group)
            dist.all_gather_into_tensor(whole.clone(), own.clone(), group=group)
        assert group.calls == 5


@pytest.mark.parametrize("size", [7, 4])
def test_messages_of_the_wrong_size_do_not(size: int) -> None:
    with absent_ranks(0, 4):
        own, whole = torch.empty(2, device=META), torch.empty(size, device=META)
        with pytest.raises(ValueError, match="all-gather over 4 ranks"):
            dist.all_gather_into_tensor(whole, own)
        with pytest.raises(ValueError, match="reduce-scatter over 4 ranks"):
            dist.reduce_scatter_tensor(own, whole)
        other = torch.empty(8, dtype=torch.float16, device=META)
        with pytest.raises(ValueError, match="float16"):
            dist.all_gather_into_tensor(other, own)
