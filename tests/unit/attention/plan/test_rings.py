"""Rings of a patch grid: every patch once, at its distance to the border."""

import pytest

from megatron_dattn.attention import ImageSpan
from megatron_dattn.attention.plan.rings import image_rings


@pytest.mark.parametrize("height", range(1, 7))
@pytest.mark.parametrize("width", range(1, 7))
def test_a_ring_holds_the_patches_at_one_distance_to_the_border(height: int, width: int) -> None:
    rings = image_rings(ImageSpan(0, 0, (height, width)), start=10)
    actual = [[token for first, end in ring for token in range(first, end)] for ring in rings]
    expected: list[list[int]] = [[] for _ in range((min(height, width) + 1) // 2)]
    for i in range(height):
        for j in range(width):
            distance = min(i, j, height - 1 - i, width - 1 - j)
            expected[distance].append(10 + i * width + j)
    assert actual == expected  # in reading order too
