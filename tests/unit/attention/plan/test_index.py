"""Token lists: slices where tokens are contiguous, indices where they are not."""

import pytest
import torch

from megatron_dattn.attention.plan.index import TokenIndex


@pytest.mark.parametrize(
    ("ranges", "expected", "contiguous"),
    [
        ([], [], True),
        ([(3, 3)], [], True),
        ([(2, 5)], [2, 3, 4], True),
        ([(2, 4), (4, 4), (4, 6)], [2, 3, 4, 5], True),
        ([(4, 6), (0, 2)], [4, 5, 0, 1], False),
        ([(0, 2), (0, 3)], [0, 1, 0, 1, 2], False),
    ],
)
def test_tokens_are_taken_in_the_order_of_their_ranges(
    ranges: list[tuple[int, int]], expected: list[int], contiguous: bool
) -> None:
    tokens = TokenIndex.from_ranges(ranges)
    assert tokens.length == len(expected)
    assert tokens.take(torch.arange(8)).tolist() == expected
    assert (tokens.index is None) == contiguous


def test_contiguous_tokens_are_taken_without_copying() -> None:
    tensor = torch.arange(8)
    taken = TokenIndex.from_ranges([(2, 5)]).take(tensor)
    assert taken.data_ptr() == tensor[2:].data_ptr()


@pytest.mark.parametrize("ranges", [[(1, 4)], [(3, 4), (1, 3)]])
def test_put_is_the_inverse_of_take(ranges: list[tuple[int, int]]) -> None:
    tokens = TokenIndex.from_ranges(ranges)
    source, target = torch.arange(6.0), torch.zeros(6)
    tokens.put(target, tokens.take(source))
    assert target.tolist() == [0, 1, 2, 3, 0, 0]


@pytest.mark.parametrize("ranges", [[(1, 3)], [(2, 3), (1, 2)]])
def test_add_accumulates(ranges: list[tuple[int, int]]) -> None:
    target = torch.ones(4)
    TokenIndex.from_ranges(ranges).add(target, torch.full((2,), 5.0))
    assert target.tolist() == [1, 6, 6, 1]


def test_a_repeated_token_receives_every_addition() -> None:
    target = torch.zeros(3, dtype=torch.bfloat16)
    TokenIndex.from_ranges([(0, 2), (0, 3)]).add(target, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert target.tolist() == [4, 6, 5]


@pytest.mark.parametrize(
    ("ranges", "places"),
    [
        ([(1, 4)], [-1, 0, 1, 2, -1]),
        ([(3, 5), (0, 1)], [2, -1, -1, 0, 1]),
        ([(0, 5)], None),
        ([(3, 5), (0, 3)], [2, 3, 4, 0, 1]),
        ([], [-1] * 5),
    ],
)
def test_every_token_knows_its_place(
    ranges: list[tuple[int, int]], places: list[int] | None
) -> None:
    tokens = TokenIndex.from_ranges(ranges, 5)
    assert (tokens.places if tokens.places is None else tokens.places.tolist()) == places
    moved = tokens.with_tensors(lambda tensor: tensor + 0)
    assert (moved.places is None) == (places is None)
