"""A pack over context-parallel ranks: every image is somewhere, all text is everywhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.parallel.context.shares import share_of, take_share
from tests.support.vlm import make_batch

GRID = (2, 3)


def pack_of(num_images: int, budget_images: int) -> TokenLayout:
    """Two samples; the first has all images but the last, the third is text alone."""
    samples = [0] * (num_images - 1) + [1] * min(1, num_images)
    images = tuple(ImageSpan(sample, 1, GRID) for sample in samples)
    return TokenLayout((4, 3, 2), images, 6 * budget_images, 10, prompt_lengths=(1, 0, 2))


@given(ranks=st.integers(1, 5), per_rank=st.integers(1, 3), used=st.floats(0, 1, exclude_max=False))
def test_shares_are_the_pack(ranks: int, per_rank: int, used: float) -> None:
    whole = pack_of(round(used * ranks * per_rank), ranks * per_rank)
    shares = [share_of(whole, rank, ranks) for rank in range(ranks)]
    assert sum((share.layout.images for share in shares), ()) == whole.images
    counts = [len(share.layout.images) for share in shares]
    assert max(counts) - min(counts) <= 1
    assert counts[0] == max(counts)
    # Of visual tokens their number in the pack, of text tokens the number from 100 on.
    numbers = torch.arange(whole.num_tokens) + 1
    numbers[whole.visual_budget :] += 100
    owned = []
    for share in shares:
        assert share.layout.visual_budget == 6 * per_rank
        assert share.layout.text_lengths == whole.text_lengths
        assert share.layout.prompt_lengths == whole.prompt_lengths
        own = share.take(numbers)
        assert len(own) == share.layout.num_tokens
        assert torch.equal(own[share.layout.visual_budget :], numbers[whole.visual_budget :])
        assert not own[share.layout.num_visual_tokens : share.layout.visual_budget].any()
        owned += own[: share.layout.num_visual_tokens].tolist()
    assert owned == list(range(1, whole.num_visual_tokens + 1))


def test_a_batch_keeps_its_own_images() -> None:
    batch = make_batch([9, 5, 8], [(3,), (), (0, 5)])
    first, second = (take_share(batch, rank, 2) for rank in range(2))
    assert torch.equal(torch.cat((first.pixel_values, second.pixel_values)), batch.pixel_values)
    assert [len(first.pixel_values), len(second.pixel_values)] == [2, 1]
    assert first.whole == second.whole == batch.layout
    assert first.layout.visual_budget == 18
    assert first.input_ids is batch.input_ids
    behind = take_share(batch.without_pixels(), 1, 2)
    assert (behind.layout, len(behind.pixel_values)) == (second.layout, 0)


def test_images_that_a_rank_has_no_room_for() -> None:
    with pytest.raises(ValueError, match="do not fit the visual budget of 9 tokens"):
        share_of(pack_of(3, 3), 0, 2)
