"""Who writes what: every shard once, and about as many bytes by every replica."""

import random
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

from megatron_dattn.checkpoint import share
from megatron_dattn.checkpoint.chunk_bytes import HostMemory
from megatron_dattn.checkpoint.share import Share


def items_of(state: dict[str, Any], replicas: int, place: int) -> list[str]:
    """Keys of what a rank writes, being the one at that place among so many."""
    with mock.patch.object(share, "_replicas", return_value=(replicas, place)):
        return [item.index.fqn for item in Share(state).save_plan.items]


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
def test_every_shard_is_written_once_and_the_bytes_are_shared(replicas: int) -> None:
    sizes = random.Random(replicas)
    tensors = {f"tensor {n}": torch.zeros(sizes.randrange(1, 5000)) for n in range(60)}
    written: Counter[str] = Counter()
    loads = []
    for place in range(replicas):
        state = {
            key: ShardedTensor.from_rank_offsets(key, tensor, replica_id=(0, 0, place))
            for key, tensor in tensors.items()
        }
        # In another order on every rank: the rule does not depend on it.
        keys = items_of(dict(sorted(state.items(), key=lambda _: sizes.random())), replicas, place)
        written.update(keys)
        loads.append(sum(tensors[key].numel() for key in keys))
    assert written == Counter(list(tensors))
    assert max(loads) < 4 / 3 * sum(loads) / replicas


def test_what_is_no_replica_is_not_dealt() -> None:
    """Shards of this rank alone, replicas over other axes, objects."""
    for place in range(2):
        shards = {
            "own": ShardedTensor.from_rank_offsets("own", torch.zeros(3)),
            "of the first": ShardedTensor.from_rank_offsets("first", torch.zeros(3), replica_id=1),
            "tensor-parallel": ShardedTensor.from_rank_offsets(
                "replica", torch.zeros(3), replica_id=(0, 1, place)
            ),
            "object": ShardedObject("object", 7, (1,), (0,), replica_id=(0, 0, place)),
        }
        expected = ["own", "object/shard_0_1"] if place == 0 else ["own"]
        assert items_of(shards, 2, place) == expected


def test_places_are_as_the_tensors_and_apart() -> None:
    memory = HostMemory()
    tensors = [
        torch.randn(3, 5),
        torch.randn(7).bfloat16(),
        torch.tensor(4.0),
        torch.zeros(0, 2),
        torch.randint(0, 9, (9,)),
        torch.tensor([True]),
    ]
    places = memory.places(tensors)
    for place, tensor in zip(places, tensors, strict=True):
        assert (place.shape, place.dtype) == (tensor.shape, tensor.dtype)
        assert place.untyped_storage().nbytes() == tensor.nbytes
        place.copy_(tensor)
    for place, tensor in zip(places, tensors, strict=True):
        assert torch.equal(place, tensor)
    assert memory.num_bytes == 64 * (1 + 1 + 1 + 0 + 2 + 1)
