"""Rings of a patch grid and segments between patches, against their definitions."""

import pytest

from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.plan.patches import (
    SegmentTable,
    last_of_centre,
    num_rings,
    ring_of_patches,
    ring_ranges,
    ring_size,
    segments_within_rings,
    segments_within_windows,
)

# Two images of one sample, one of another; equal grids share what is kept of them.
GRIDS = [(3, 4), (3, 4), (1, 5)]
LAYOUT = TokenLayout(
    (2, 1),
    (ImageSpan(0, 0, GRIDS[0]), ImageSpan(0, 1, GRIDS[1]), ImageSpan(1, 1, GRIDS[2])),
    visual_budget=31,
    text_budget=3,
)


def seen(segments: SegmentTable) -> dict[int, list[int]]:
    """The keys of every query token, in ascending order."""
    queries = [token for start, end in segments.queries.tolist() for token in range(start, end)]
    keys = [token for start, end in segments.keys.tolist() for token in range(start, end)]
    found: dict[int, list[int]] = {}
    for num_queries, num_keys in zip(segments.query_lengths, segments.key_lengths, strict=True):
        own, keys = keys[:num_keys], keys[num_keys:]
        found |= dict.fromkeys(queries[:num_queries], sorted(own))
        queries = queries[num_queries:]
    assert not queries
    assert not keys
    return found


def patches(image: int) -> list[tuple[int, int, int]]:
    """Row, column and token of every patch."""
    start, (height, width) = LAYOUT.image_tokens[image][0], GRIDS[image]
    return [(i, j, start + i * width + j) for i in range(height) for j in range(width)]


def ring(i: int, j: int, grid: tuple[int, int]) -> int:
    return min(i, j, grid[0] - 1 - i, grid[1] - 1 - j)


def test_a_ring_sees_earlier_images_and_the_rings_around_it() -> None:
    found = seen(segments_within_rings(LAYOUT))
    for image, grid in enumerate(GRIDS):
        earlier = [token for _, _, token in patches(0)] if image == 1 else []
        for i, j, token in patches(image):
            outer = [t for k, m, t in patches(image) if ring(k, m, grid) <= ring(i, j, grid)]
            assert found.pop(token) == earlier + outer
    assert not found


@pytest.mark.parametrize("reach", [0, 1, 2])
def test_a_window_holds_the_patches_within_reach(reach: int) -> None:
    found = seen(segments_within_windows(LAYOUT, reach))
    for image in range(len(GRIDS)):
        for i, j, token in patches(image):
            near = [t for k, m, t in patches(image) if max(abs(k - i), abs(m - j)) <= reach]
            assert found.pop(token) == near
    assert not found


def test_what_is_kept_of_a_grid_stays_as_it_is() -> None:
    first = seen(segments_within_rings(LAYOUT))
    assert seen(segments_within_rings(LAYOUT)) == first


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
