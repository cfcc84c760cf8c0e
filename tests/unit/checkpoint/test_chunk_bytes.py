"""Chunks read in place equal those that torch unpickles; what is stored otherwise is left to it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_dattn.checkpoint import save_checkpoint, verify
from megatron_dattn.checkpoint.chunk_bytes import empty_on_host, read_chunk_into
from megatron_dattn.checkpoint.tensors import open_tensors
from megatron_dattn.errors import CheckpointError
from tests.unit.checkpoint.conftest import FACTS


def store(path: Path, value: Tensor, before: bytes = b"something else") -> tuple[int, int]:
    """Append a chunk to a shard as the writer does; its offset and length."""
    with open(path, "ab") as file:
        file.write(before)
        offset = file.tell()
        torch.save(value, file)
        return offset, file.tell() - offset


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 1, 7)])
def test_every_chunk_of_a_shard_lands_in_its_place(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    shard = tmp_path / "shard"
    values = [torch.randn(shape).mul(100).to(dtype) for _ in range(3)]
    places = [store(shard, value) for value in values]
    for value, (offset, length) in zip(values, places, strict=True):
        target = empty_on_host(torch.Size(shape), dtype)
        assert read_chunk_into(target, shard, offset, length)
        assert torch.equal(target, value)


def test_what_is_not_stored_in_order_is_left_alone(tmp_path: Path) -> None:
    shard = tmp_path / "shard"
    whole = torch.arange(12.0).reshape(3, 4)
    for value in (whole.T, whole[1:], whole[:, :2], whole.bool()):
        place = store(shard, value)
        target = torch.full(value.shape, 7.0)
        assert not read_chunk_into(target, shard, *place)
        assert (target == 7.0).all()


def test_a_file_that_ends_early_is_an_error(tmp_path: Path, monkeypatch) -> None:
    shard = tmp_path / "shard"
    value = torch.randn(100, 100)
    place = store(shard, value, before=b"")
    # As if the file became shorter after its archive was looked into.
    monkeypatch.setattr("os.preadv", lambda descriptor, buffers, position: 0)
    with pytest.raises(CheckpointError, match="ends 40000 bytes too early"):
        read_chunk_into(torch.empty(100, 100), shard, *place)


def test_short_reads_go_on(tmp_path: Path, monkeypatch) -> None:
    """The kernel gives no more than 2 GiB at once."""
    shard = tmp_path / "shard"
    value = torch.randn(100, 100)
    place = store(shard, value)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda d, buffers, at: preadv(d, [buffers[0][:1001]], at))
    target = torch.empty(100, 100)
    assert read_chunk_into(target, shard, *place)
    assert torch.equal(target, value)


def test_a_torch_that_does_not_tell_where_values_begin_reads_them_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place of the values is a private attribute of torch's fake storages."""
    value = torch.randn(3, 5)
    state = {"weight": ShardedTensor.from_rank_offsets("body.weight", value)}
    path = save_checkpoint(tmp_path, 1, state, facts=FACTS)
    load, looks = torch.load, []

    def without_place(*arguments: Any, **options: Any) -> Any:
        loaded = load(*arguments, **options)
        place = getattr(loaded.untyped_storage(), "_checkpoint_offset", None)
        looks.append(place)
        if place is not None:
            del loaded.untyped_storage()._checkpoint_offset
        return loaded

    monkeypatch.setattr(torch, "load", without_place)
    assert torch.equal(open_tensors(path)["body.weight"].load(), value)
    assert looks[0] is not None  # that of a look under the fake mode, which found none then
    assert len(looks) == 2


def test_a_strided_parameter_of_a_checkpoint_is_read_by_torch(tmp_path: Path) -> None:
    value = torch.arange(12.0).reshape(3, 4).T
    state = {"weight": ShardedTensor.from_rank_offsets("body.weight", value)}
    path = save_checkpoint(tmp_path, 1, state, facts=FACTS)
    verify(path)
    assert torch.equal(open_tensors(path)["body.weight"].load(), value)
