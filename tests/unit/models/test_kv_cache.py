"""What is remembered comes back in the order in which it came, wherever it lies in memory."""

import torch
from torch import Tensor

from megatron_dattn.models.kv_cache import DecodeCache, KVCache


def tokens(*shape: int, first: int) -> Tensor:
    """Tokens of one head with one channel, all different."""
    return torch.arange(first, first + shape[0] * shape[1]).view(*shape, 1, 1).double()


def test_a_pack_is_what_was_there_and_what_is_added() -> None:
    images = [(torch.tensor([1.0]), torch.tensor([2.0])), (torch.tensor([3.0]), torch.ones(1))]
    cache = KVCache(images)
    key, value = cache.extend(torch.tensor([4.0, 5.0]), torch.zeros(2))
    assert (key.tolist(), value.tolist()) == ([1, 3, 4, 5], [2, 1, 0, 0])
    assert cache.tokens == (key, value)


def test_text_grows_in_place_and_moves_seldom() -> None:
    expected = tokens(2, 3, first=0)
    cache = DecodeCache(None, (expected, -expected))
    places = set()
    for step in range(300):
        new = tokens(2, 1, first=100 + 2 * step)
        key, value = cache.add(new[:, 0], -new[:, 0])
        expected = torch.cat((expected, new), dim=1)
        assert torch.equal(key, expected)
        assert torch.equal(value, -expected)
        places.add(key.data_ptr())
    assert len(places) <= 4  # 67, 134, 268 and 536 columns; memory may be used again


def test_samples_that_have_ended_are_forgotten() -> None:
    images, text = tokens(3, 2, first=0), tokens(3, 1, first=10)
    cache = DecodeCache((images, -images), (text, -text))
    cache.keep([0, 2])
    assert cache.images is not None
    assert torch.equal(cache.images[0], images[[0, 2]])
    assert torch.equal(cache.images[1], -images[[0, 2]])
    new = tokens(2, 1, first=20)
    key, value = cache.add(new[:, 0], -new[:, 0])
    assert key.flatten(1).tolist() == [[10, 20], [12, 21]]
    assert torch.equal(value, -key)
