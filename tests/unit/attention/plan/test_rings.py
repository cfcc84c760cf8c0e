"""Rings of a patch grid: every patch once, at its distance to the border."""

import pytest

from megatron_dattn.attention.plan.rings import (
    last_of_centre,
    num_rings,
    ring_of_patches,
    ring_ranges,
    ring_size,
)


@pytest.mark.parametrize("height", range(1, 7))
@pytest.mark.parametrize("width", range(1, 7))
def test_a_ring_holds_the_patches_at_one_distance_to_the_border(height: int, width: int) -> None:
    grid, expected = (height, width), []
    for i in range(height):
        for j in range(width):
            expected.append(min(i, j, height - 1 - i, width - 1 - j))
    assert ring_of_patches(grid).tolist() == expected
    assert num_rings(grid) == max(expected) + 1
    for ring in range(num_rings(grid)):
        places = [place for place, own in enumerate(expected) if own == ring]
        ranges = ring_ranges(grid, ring)
        # In reading order too.
        assert [place for first, end in ranges for place in range(first, end)] == places
        assert ring_size(grid, ring) == len(places)
    assert last_of_centre(grid) == places[-1]
