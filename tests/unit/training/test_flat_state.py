"""Ranges of flattened tensors as boxes, and what the distributed optimizer holds as such boxes."""

import itertools
from collections.abc import Iterator
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dattn.runtime.cpu import enable_cpu_runtime

enable_cpu_runtime()  # before anything imports megatron-core

from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory  # noqa: E402

from megatron_dattn.runtime.distributed import destroy_distributed  # noqa: E402
from megatron_dattn.training.flat_state import boxes, older_names, sharded_flat_state  # noqa: E402
from tests.support.megatron import init_model_parallel  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_process() -> Iterator[None]:
    init_model_parallel()
    yield
    destroy_distributed()


@pytest.mark.parametrize(
    "shape", [(), (5,), (3, 4), (2, 3, 4), (1, 4), (4, 1), (2, 1, 3), (2, 2, 2, 2), (3, 0)], ids=str
)
def test_boxes_hold_exactly_the_range_in_order(shape: tuple[int, ...]) -> None:
    places = list(itertools.product(*map(range, shape)))
    for start, stop in itertools.combinations_with_replacement(range(prod(shape) + 1), 2):
        found = list(boxes(shape, start, stop))
        assert len(found) <= max(1, 2 * len(shape) - 1)
        inside = [
            tuple(map(sum, zip(offsets, place, strict=True)))
            for offsets, sizes in found
            for place in itertools.product(*map(range, sizes))
        ]
        assert inside == places[start:stop]


LAYERS = 3


def optimizer_of(parameter: torch.nn.Parameter, start: int, stop: int, moment: torch.Tensor) -> Any:
    """As much of a distributed optimizer as is looked at: it holds a range of one parameter."""
    ranges = {"param": SimpleNamespace(start=start, end=stop)}
    state = {"param": moment[start:stop] * 2, "exp_avg": moment[start:stop], "step": 7}
    return SimpleNamespace(
        gbuf_ranges=[{"dtypes": [{"param_map": {parameter: ranges}}]}],
        config=SimpleNamespace(use_precision_aware_optimizer=False),
        _get_main_param_and_optimizer_states=lambda asked: dict(state),
    )


def joined(shards: list[ShardedTensor]) -> torch.Tensor:
    """The tensor that the shards are of; -1 where there is none."""
    whole = torch.full(shards[0].global_shape, -1.0)
    for shard in shards:
        place = tuple(
            slice(first, first + length)
            for first, length in zip(shard.global_offset, shard.local_shape, strict=True)
        )
        assert (whole[place] == -1).all(), "twice"
        whole[place] = shard.data
    return whole


@pytest.mark.parametrize("with_factory", [False, True], ids=["plain", "gate and up"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_ranks_parts_make_the_whole_tensor(with_factory: bool, dtype: torch.dtype) -> None:
    """Of the middle one of three layers, which are one tensor; cut wherever ranks may."""
    parameter = torch.nn.Parameter(torch.zeros(4, 3, dtype=dtype))
    layer = (0, 1, LAYERS)
    shard: Any = ShardedTensor.from_rank_offsets(
        "layers.weight", parameter, layer, prepend_axis_num=1, replica_id=(0, 0, 5)
    )
    if with_factory:
        shard = apply_swiglu_sharded_factory(shard, (layer,))
    moment = torch.arange(12.0)
    for cuts in itertools.combinations_with_replacement(range(13), 2):
        found: list[ShardedTensor] = []
        for start, stop in itertools.pairwise((0, *cuts, 12)):
            optimizer = optimizer_of(parameter, start, stop, moment)
            found += nested_values(sharded_flat_state(optimizer, {"model": {"weight": shard}}))
        moments = [s for s in found if s.key == "optimizer.state.exp_avg.layers.weight"]
        masters = [s for s in found if s.key == "optimizer.state.fp32_param.layers.weight"]
        assert len(moments) + len(masters) == len(found)
        assert all(s.replica_id == 0 for s in found)
        whole = joined(moments)
        assert torch.equal(whole[1], moment.view(4, 3))
        assert (whole[::2] == -1).all()
        if dtype == torch.float32:
            assert not masters  # the weights themselves
        else:
            assert torch.equal(joined(masters)[1], 2 * moment.view(4, 3))


def test_replicas_of_other_kinds_are_not_written_twice() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    for replica, written in (((0, 0, 3), True), ((0, 1, 0), False), ((1, 0, 0), False), (0, True)):
        shard = ShardedTensor.from_rank_offsets("w", parameter, replica_id=replica)
        optimizer = optimizer_of(parameter, 1, 3, torch.arange(4.0))
        (part,) = nested_values(sharded_flat_state(optimizer, {"w": shard}))
        assert (part.replica_id == 0) is written
        assert part.global_offset == (1,)


def test_reading_into_the_parts_fills_the_optimizer() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, 3))
    moment = torch.zeros(12)
    shard = ShardedTensor.from_rank_offsets("w", parameter)
    for part in nested_values(
        sharded_flat_state(optimizer_of(parameter, 2, 11, moment), {"w": shard})
    ):
        part.data.fill_(1)
    assert moment.tolist() == [0.0, 0.0, *[1.0] * 9, 0.0]


def test_weights_of_older_checkpoints_are_found_under_their_name() -> None:
    stored = {
        "half": torch.bfloat16,
        "optimizer.state.param.half": torch.float32,
        "full": torch.float32,
        "optimizer.state.param.full": torch.float32,
        "optimizer.state.exp_avg.full": torch.float32,
        "object": None,
    }
    keys = ["optimizer.state.fp32_param.half", "optimizer.state.exp_avg.full", "full", "new"]
    request = {key: ShardedTensor.from_rank_offsets(key, torch.zeros(1)) for key in keys}
    assert older_names(request, stored) == {"optimizer.state.param.full"}
    assert [shard.key for shard in request.values()] == [
        "optimizer.state.param.half",
        *keys[1:],
    ]
