"""First-fit packing: nothing lost, nothing repeated, budgets held."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dattn.data.packing import buffer_size, pack_samples

BUDGET = 10


@dataclass(frozen=True)
class Tokens:
    num_visual_tokens: int
    num_text_tokens: int
    epoch: int = 0


samples = st.lists(
    st.builds(Tokens, st.integers(0, BUDGET), st.integers(1, BUDGET)),
    max_size=30,
)


def pack(tokens: list[Tokens], max_samples: int = 4, keep_order: bool = False) -> list[list[int]]:
    return pack_samples(
        tokens,
        visual_budget=BUDGET,
        text_budget=BUDGET,
        max_samples=max_samples,
        keep_order=keep_order,
    )


@settings(deadline=None)
@given(samples, st.integers(1, 6), st.booleans())
def test_every_sample_is_packed_once_within_the_budgets(
    tokens: list[Tokens], max_samples: int, keep_order: bool
) -> None:
    packs = pack(tokens, max_samples, keep_order)
    assert sorted(index for members in packs for index in members) == list(range(len(tokens)))
    for members in packs:
        assert members
        assert members == sorted(members)
        assert sum(tokens[index].num_visual_tokens for index in members) <= BUDGET
        assert sum(tokens[index].num_text_tokens for index in members) <= BUDGET
        assert len(members) <= max_samples
    assert packs == pack(tokens, max_samples, keep_order)


@settings(deadline=None)
@given(samples)
def test_keep_order_keeps_the_order(tokens: list[Tokens]) -> None:
    packed = [index for members in pack(tokens, keep_order=True) for index in members]
    assert packed == list(range(len(tokens)))


@settings(deadline=None)
@given(samples)
def test_no_two_packs_could_be_one(tokens: list[Tokens]) -> None:
    """First fit: the first sample of a pack did not fit any earlier pack."""
    packs = pack(tokens)
    for later, members in enumerate(packs):
        opener = tokens[members[0]]
        for earlier in packs[:later]:
            before = [tokens[index] for index in earlier if index < members[0]]
            assert (
                sum(r.num_visual_tokens for r in before) + opener.num_visual_tokens > BUDGET
                or sum(r.num_text_tokens for r in before) + opener.num_text_tokens > BUDGET
                or len(before) == 4
            )


def test_a_small_sample_fills_an_earlier_pack() -> None:
    assert pack([Tokens(6, 1), Tokens(6, 1), Tokens(4, 1)]) == [[0, 2], [1]]
    assert pack([Tokens(6, 1), Tokens(6, 1), Tokens(4, 1)], keep_order=True) == [[0], [1, 2]]


@settings(deadline=None)
@given(samples, st.integers(0, 30))
def test_an_epoch_is_given_out_before_the_next(tokens: list[Tokens], end: int) -> None:
    """Read one after the other; the pack at the boundary may hold both."""
    tokens = [
        Tokens(r.num_visual_tokens, r.num_text_tokens, int(i >= end)) for i, r in enumerate(tokens)
    ]
    packs = pack(tokens)
    assert sorted(index for members in packs for index in members) == list(range(len(tokens)))
    epochs = [tokens[index].epoch for members in packs for index in members]
    assert epochs == sorted(epochs)


def test_the_next_epoch_fills_up_the_last_pack() -> None:
    tokens = [Tokens(6, 1), Tokens(6, 1), Tokens(4, 1, epoch=1), Tokens(4, 1, epoch=1)]
    assert pack(tokens) == [[0], [1, 2], [3]]


def test_a_sample_beyond_the_budgets_is_our_mistake() -> None:
    with pytest.raises(ValueError, match="11 visual"):
        pack([Tokens(11, 1)])


def test_the_buffer_holds_at_least_two_packs() -> None:
    assert buffer_size(32, 8) == 32
    assert buffer_size(32, 64) == 128
