"""Start-up, its errors, and seeds."""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.testing._internal.distributed import fake_pg  # registers the backend "fake"

from megatron_dattn.checkpoint.commit import parallel_layout
from megatron_dattn.errors import ConfigError
from megatron_dattn.runtime import distributed
from megatron_dattn.runtime.distributed import (
    check_parallel_sizes,
    destroy_distributed,
    get_device,
    host_group,
    initialize_distributed,
    is_rank_0,
    one_process,
    seed_everything,
    world_of_one,
    world_size,
)
from megatron_dattn.runtime.launcher import Launch
from tests.support.distributed import run_distributed

assert fake_pg


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, and no process group before or after."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    destroy_distributed()
    yield
    destroy_distributed()


@pytest.mark.parametrize(
    ("sizes", "data_parallel"), [((1, 1, 1), 1), ((8, 2, 2), 2), ((16, 4, 2), 2)]
)
def test_data_parallel_size(sizes: tuple[int, ...], data_parallel: int) -> None:
    assert check_parallel_sizes(*sizes) == data_parallel


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((6, 4, 1), ["tensor_model_parallel_size 4", "= 4", "world size 6", "multiple of 4"]),
        ((2, 2, 2), ["= 4", "world size 2", "torchrun"]),
        ((4, 0, 1), ["tensor_model_parallel_size is 0"]),
        ((4, 1, -2), ["pipeline_model_parallel_size is -2"]),
    ],
)
def test_impossible_sizes_are_named(sizes: tuple[int, ...], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_parallel_sizes(*sizes)
    for word in words:
        assert word in str(error.value)


@pytest.mark.usefixtures("alone")
def test_one_process_without_a_launcher() -> None:
    initialize_distributed()
    assert dist.get_world_size() == 1
    assert is_rank_0()
    assert parallel_state.get_data_parallel_world_size() == 1
    total = torch.ones(1, device=get_device())
    dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    assert total.item() == 1
    destroy_distributed()
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    destroy_distributed()
    initialize_distributed()  # once more: nothing stayed behind


@pytest.mark.usefixtures("alone")
def test_wrong_sizes_fail_before_any_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)  # with no MASTER_ADDR: joining would fail otherwise
    with pytest.raises(ConfigError, match="world size 3"):
        initialize_distributed(tensor_model_parallel_size=2)
    assert not dist.is_initialized()


@pytest.mark.usefixtures("alone")
def test_more_processes_than_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(distributed, "enable_cpu_runtime", lambda: None)
    for name, value in {"WORLD_SIZE": "3", "RANK": "2", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="local rank 2 has no CUDA device: this machine shows 2"):
        initialize_distributed()


@pytest.mark.usefixtures("alone")
def test_srun_may_show_each_task_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """--gpus-per-task binds a GPU to each task: the third of a node sees it as its only one."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    distributed._select_cuda_device(Launch("srun", 2, 4, 2))
    assert chosen == [0]
    with pytest.raises(ConfigError, match="local rank 2"):
        distributed._select_cuda_device(Launch("torchrun", 2, 4, 2))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("on_cuda", [False, True])
def test_nccl_is_told_its_device(monkeypatch: pytest.MonkeyPatch, on_cuda: bool) -> None:
    joined: list[tuple[str, torch.device | None]] = []

    def join(backend: str, *, device_id: torch.device | None, **_: object) -> None:
        joined.append((backend, device_id))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setattr(distributed, "introduce_rank", lambda: None)
    distributed._join_process_group(Launch("alone", 0, 1, 0), 10.0, 10.0)
    assert joined == [("nccl", torch.device("cuda", 3)) if on_cuda else ("gloo", None)]


def groups_of_this_rank() -> tuple[int, int, int, float]:
    initialize_distributed(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, timeout_seconds=30
    )
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        is_rank_0(),
    )


def test_model_parallel_groups() -> None:
    ranks = run_distributed(groups_of_this_rank, 4)
    assert ranks == [(0, 0, 1, True), (1, 0, 1, False), (0, 1, 1, False), (1, 1, 1, False)]


@pytest.mark.usefixtures("alone")
def test_seeds_every_generator() -> None:
    initialize_distributed()

    def draw() -> list[float]:
        with tensor_parallel.get_cuda_rng_tracker().fork():
            inside = torch.rand(1).item()
        return [random.random(), float(np.random.rand()), torch.rand(1).item(), inside]

    seed_everything(5)
    first = draw()
    seed_everything(5)
    assert draw() == first
    seed_everything(6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_work_of_one_process_cleans_up_what_it_set_up(alone: None) -> None:
    with one_process():
        assert dist.get_world_size() == 1
        assert parallel_state.model_parallel_is_initialized()
        with one_process():
            pass
        assert dist.is_initialized(), "those of the outer block stay"
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()


def test_a_world_of_one_needs_no_model_parallel_groups(alone: None) -> None:
    with world_of_one():
        assert dist.get_world_size() == world_size() == 1
        assert not parallel_state.model_parallel_is_initialized()
        # A checkpoint written here is of one rank in every direction all the same.
        assert set(parallel_layout().values()) == {1}
        assert len(parallel_layout()) == 5
    assert not dist.is_initialized()


def test_work_of_one_process_is_not_for_a_launcher(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="without torchrun"), one_process():
        pass
    monkeypatch.delenv("RANK")  # left over from an earlier command: nobody else is there
    with one_process():
        assert dist.get_world_size() == 1


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
