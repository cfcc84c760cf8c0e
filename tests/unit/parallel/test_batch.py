"""Packs reach every rank that works on them, and their pixels those that read them."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.batch import PackedBatch
from megatron_dattn.parallel.batch import is_loading_rank, pack_on_device, share_packs
from tests.support.distributed import run_distributed

SCALE = torch.tensor([[0.1, 0.2, 0.3], [1.0, 2.0, 1 / 3]])


def make_batch(num_images: int, loaded: bool = False, side: int = 4) -> PackedBatch:
    """With pixels as floats, or as they are loaded."""
    generator = torch.Generator().manual_seed(num_images)
    layout = TokenLayout(
        text_lengths=(3, 5),
        images=tuple(ImageSpan(1, offset, (2, 2)) for offset in range(num_images)),
        visual_budget=16,
        text_budget=12,
    )
    pixels = torch.rand(num_images, 3, side, side, generator=generator)
    return PackedBatch(
        layout=layout,
        input_ids=torch.randint(0, 99, (12,), generator=generator),
        labels=torch.randint(-100, 99, (12,), generator=generator),
        pixel_values=(255 * pixels).byte() if loaded else pixels,
        pixel_scale=SCALE if loaded else None,
        sample_keys=["a", f"b{num_images}"],
    )


def assert_same(received: PackedBatch, expected: PackedBatch) -> None:
    assert received.layout == expected.layout
    assert received.sample_keys == expected.sample_keys
    for name in ("input_ids", "labels", "pixel_values"):
        value = getattr(received, name)
        assert value.dtype == getattr(expected, name).dtype
        assert torch.equal(value, getattr(expected, name))


def packs_arrive() -> None:
    group = dist.group.WORLD
    mine = dist.get_rank() == 0
    for loaded in (False, True):
        batches = [make_batch(num_images, loaded) for num_images in (3, 0, 1)]
        packs = share_packs(batches if mine else [], group=group)
        assert len(packs) == len(batches)
        for pack, batch in zip(packs, batches, strict=True):
            received = pack_on_device(pack, "cpu", group=group, pixels=True)
            assert_same(received, batch.normalised())
            received = pack_on_device(pack, "cpu", group=group, pixels=False)
            assert_same(received, batch.without_pixels().normalised())


def test_packs_reach_all_ranks() -> None:
    run_distributed(packs_arrive, 2)


def test_that_there_are_none_is_told() -> None:
    assert run_distributed(none_arrive, 2) == [[], []]


def none_arrive() -> list[PackedBatch]:
    return share_packs([], group=dist.group.WORLD)


def groups_are_separate() -> bool:
    """Two groups of two ranks, as two data-parallel replicas, and megatron-core's defaults."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    batch = make_batch(1 + dist.get_rank() // 2)
    (pack,) = share_packs([batch] if is_loading_rank() else [])
    assert_same(pack_on_device(pack, "cpu"), batch)
    return is_loading_rank()


def test_each_group_gets_its_own_packs() -> None:
    assert run_distributed(groups_are_separate, 4) == [True, False, True, False]


def context_parallel_ranks_share() -> tuple[bool, list[list[str]]]:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=2, context_parallel_size=2
    )
    packs = share_packs([make_batch(2), make_batch(0)] if is_loading_rank() else [])
    assert [pack.pixel_values.shape[0] for pack in packs] == [2, 0]
    return is_loading_rank(), [pack.sample_keys for pack in packs]


def test_one_rank_loads_for_context_parallel_ranks_too() -> None:
    keys = [["a", "b2"], ["a", "b0"]]
    expected = [(True, keys), *[(False, keys)] * 3]
    assert run_distributed(context_parallel_ranks_share, 4) == expected


def bytes_received(num_packs: int, side: int) -> tuple[bool, list[int], list[int]]:
    """Whether this rank loads, and the bytes of each message to it before a step and within."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2
    )
    batches = [make_batch(2, True, side) for _ in range(num_packs)]
    before, within = list[int](), list[int]()
    messages, broadcast = before, dist.broadcast

    def noted(tensor: torch.Tensor, src: int, **options: Any) -> Any:
        if src != dist.get_rank():
            messages.append(tensor.nbytes)
        return broadcast(tensor, src=src, **options)

    with mock.patch.object(dist, "broadcast", noted):
        packs = share_packs(batches if is_loading_rank() else [])
        messages = within
        received = [pack_on_device(pack, "cpu") for pack in packs]
    for batch, expected in zip(received, batches, strict=True):
        if not parallel_state.is_pipeline_first_stage():
            expected = expected.without_pixels()
        assert_same(batch, expected.normalised())
    return is_loading_rank(), before, within


@pytest.mark.parametrize("num_packs", [1, 3])
def test_one_rank_loads_and_pixels_stop_at_the_first_pipeline_stage(num_packs: int) -> None:
    small = run_distributed(bytes_received, 4, num_packs, 4)
    large = run_distributed(bytes_received, 4, num_packs, 64)
    assert [loads for loads, _, _ in large] == [True, False, False, False]
    # Whatever the number of packs a length and the texts, which do not grow with the pixels.
    sizes = [before for _, before, _ in large]
    assert sizes[0] == []
    assert sizes[1] == sizes[2] == sizes[3]
    assert len(sizes[1]) == 2
    assert abs(sum(sizes[1]) - sum(small[1][1])) < 16
    # Two images of a pack, of one byte per pixel and channel, to the other rank of the first stage.
    assert [within for _, _, within in large] == [[], num_packs * [2 * 3 * 64 * 64], [], []]
