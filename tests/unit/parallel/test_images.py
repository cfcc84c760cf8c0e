"""A pack's images over the ranks of a group, also fewer than there are ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dattn.parallel.images import ImageShares
from tests.support.distributed import run_distributed

COUNTS = (1, 3, 4, 7)


def _shares() -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """By number of images: this rank's share, all features, and the gradient of its own."""
    shares, found = ImageShares(dist.group.WORLD), {}
    for count in COUNTS:
        images = torch.arange(1.0, count + 1).view(count, 1).expand(count, 2)
        own = shares.take(images).clone().requires_grad_()
        features = shares.gather(10 * own, count)
        (features * images).sum().backward()
        found[count] = own.detach(), features.detach(), own.grad
    return found


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_image_is_encoded_once_and_blank_ones_are_dropped(ranks: int) -> None:
    results = run_distributed(_shares, ranks)
    for count in COUNTS:
        images = torch.arange(1.0, count + 1).view(count, 1).expand(count, 2)
        owned = torch.cat([result[count][0] for result in results])
        share = -(-count // ranks)
        assert all(len(result[count][0]) == share for result in results)
        assert torch.equal(owned[:count], images)
        assert not owned[count:].any()
        for result in results:
            assert torch.equal(result[count][1], 10 * images)
        gradients = torch.cat([result[count][2] for result in results])
        assert torch.equal(gradients[:count], 10 * images)
        assert not gradients[count:].any()


def _summed() -> list[Tensor]:
    rank = dist.get_rank()
    gradients = [torch.full((3,), 1.0 + rank), torch.full((2, 2), 10.0 * rank)]
    ImageShares(dist.group.WORLD).sum_gradients(gradients)
    module = nn.Linear(2, 2)
    nn.init.constant_(module.weight, rank)
    ImageShares(dist.group.WORLD).share_values(module)
    return [*gradients, module.weight.detach()]


def test_gradients_are_summed_and_values_are_the_first_ranks() -> None:
    for first, second, weight in run_distributed(_summed, 2):
        assert first.tolist() == [3.0] * 3
        assert second.flatten().tolist() == [10.0] * 4
        assert not weight.any()
