"""Ragged segments as padded batches: nothing lost, little wasted."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dattn.attention.plan.padding import PaddedTokens, padded_batches

lengths_lists = st.lists(st.integers(1, 7), min_size=1, max_size=6)


@settings(deadline=None)
@given(lengths=lengths_lists, start=st.integers(0, 3))
def test_unpad_inverts_pad(lengths: list[int], start: int) -> None:
    ragged = torch.randn(start + sum(lengths) + 2, 3)
    tokens = PaddedTokens.build(start, lengths, "cpu")
    expected = ragged[start : start + sum(lengths)]
    for padded in (tokens.pad(ragged), tokens.pad_with_zeros(ragged)):
        assert padded.shape == (len(lengths), max(lengths), 3)
        assert torch.equal(tokens.unpad(padded), expected)


def test_padding_repeats_the_last_token_or_is_zero() -> None:
    tokens = PaddedTokens.build(1, (1, 3), "cpu")
    ragged = torch.tensor([9, 1, 2, 3, 4])
    assert tokens.pad(ragged).tolist() == [[1, 1, 1], [2, 3, 4]]
    assert tokens.pad_with_zeros(ragged).tolist() == [[1, 0, 0], [2, 3, 4]]
    padding = tokens.padding()
    assert padding is not None
    assert padding.tolist() == [[False, True, True], [False, False, False]]


def test_equal_lengths_need_no_copies_and_no_mask() -> None:
    ragged = torch.randn(6, 2)
    tokens = PaddedTokens.build(0, (3, 3), "cpu")
    assert tokens.pad(ragged).data_ptr() == ragged.data_ptr()
    (batch,) = padded_batches((1, 2), (3, 3), causal=False, device="cpu")
    assert batch.key_bias is None


def test_ragged_keys_are_masked_unless_a_causal_mask_hides_them() -> None:
    (free,) = padded_batches((2, 2), (1, 3), causal=False, device="cpu")
    assert free.key_bias is not None
    assert free.key_bias.flatten(1).tolist() == [[0, -torch.inf, -torch.inf], [0, 0, 0]]
    (causal,) = padded_batches((1, 3), (1, 3), causal=True, device="cpu")
    assert causal.key_bias is None


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 2000), max_size=8))
def test_batches_hold_all_segments_in_order_without_much_waste(lengths: list[int]) -> None:
    batches = padded_batches(lengths, lengths, causal=True, device="cpu")
    assert [n for batch in batches for n in batch.queries.lengths] == lengths
    next_start = 0
    for batch in batches:
        assert batch.queries.start == batch.keys.start == next_start
        next_start += batch.queries.num_tokens
        needed = sum(n * n for n in batch.queries.lengths)
        assert len(batch.queries.lengths) * batch.queries.width**2 <= 1.5 * needed + 20_000


def test_short_segments_share_a_batch_and_a_long_one_stands_alone() -> None:
    batches = padded_batches((20, 35, 30, 3000, 25), (16, 16, 16, 3000, 16), False, "cpu")
    assert [batch.queries.lengths for batch in batches] == [(20, 35, 30), (3000,), (25,)]
