"""A pack reaches every rank of its tensor-parallel group."""

import torch
import torch.distributed as dist

from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.batch import PackedBatch
from megatron_dattn.parallel.batch import broadcast_batch
from tests.support.distributed import run_distributed

SCALE = torch.tensor([[0.1, 0.2, 0.3], [1.0, 2.0, 1 / 3]])


def make_batch(num_images: int, loaded: bool = False) -> PackedBatch:
    """With pixels as floats, or as they are loaded."""
    generator = torch.Generator().manual_seed(num_images)
    layout = TokenLayout(
        text_lengths=(3, 5),
        images=tuple(ImageSpan(1, offset, (2, 2)) for offset in range(num_images)),
        visual_budget=16,
        text_budget=12,
    )
    pixels = torch.rand(num_images, 3, 4, 4, generator=generator)
    return PackedBatch(
        layout=layout,
        input_ids=torch.randint(0, 99, (12,), generator=generator),
        labels=torch.randint(-100, 99, (12,), generator=generator),
        pixel_values=(255 * pixels).byte() if loaded else pixels,
        pixel_scale=SCALE if loaded else None,
        sample_keys=["a", "b"],
    )


def send(batch: PackedBatch, pixels: bool = True) -> PackedBatch:
    mine = batch if dist.get_rank() == 0 else None
    return broadcast_batch(mine, "cpu", group=dist.group.WORLD, pixels=pixels)


def assert_same(received: PackedBatch, expected: PackedBatch) -> None:
    assert received.layout == expected.layout
    for name in ("input_ids", "labels", "pixel_values"):
        value = getattr(received, name)
        assert value.dtype == getattr(expected, name).dtype
        assert torch.equal(value, getattr(expected, name))
    assert received.sample_keys == (["a", "b"] if dist.get_rank() == 0 else [])


def batches_arrive() -> None:
    for num_images in (3, 0, 1):
        for loaded in (False, True):
            batch = make_batch(num_images, loaded)
            assert_same(send(batch), batch.normalised())
            assert_same(send(batch, pixels=False), batch.without_pixels().normalised())


def test_batches_reach_all_ranks() -> None:
    run_distributed(batches_arrive, 2)


def groups_are_separate() -> None:
    """Two groups of two ranks, as two data-parallel replicas, and megatron-core's defaults."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    replica = dist.get_rank() // 2
    batch = make_batch(1 + replica)
    received = broadcast_batch(batch if dist.get_rank() % 2 == 0 else None, "cpu")
    assert received.layout == batch.layout
    assert torch.equal(received.pixel_values, batch.pixel_values)


def test_each_group_gets_its_own_batch() -> None:
    run_distributed(groups_are_separate, 4)


def later_stages_get_no_pixels() -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    received = broadcast_batch(make_batch(2), "cpu")
    assert len(received.pixel_values) == (2 if parallel_state.is_pipeline_first_stage() else 0)
    assert len(received.layout.images) == 2


def test_pixels_stop_at_the_first_pipeline_stage() -> None:
    run_distributed(later_stages_get_no_pixels, 2)
