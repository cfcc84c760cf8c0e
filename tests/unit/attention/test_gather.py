"""Tokens go to the parts rotated, and what comes of them goes back to where they stand."""

import torch
from torch import Tensor

from megatron_dattn.attention.gather import (
    add_key_gradients,
    add_query_gradients,
    join_parts,
    take_rotated,
)
from megatron_dattn.attention.plan.index import TokenIndex
from megatron_dattn.attention.positions import apply_rotary, rotary_tables

TOKENS, HEADS, DIM = 6, 2, 4
ROTARY = rotary_tables(torch.arange(TOKENS), DIM, base=10.0)
BACK = ROTARY[0], -ROTARY[1]
SLICE = TokenIndex.from_ranges([(1, 4)], TOKENS)
LIST = TokenIndex.from_ranges([(4, 6), (0, 2)], TOKENS)
EVERYTHING = TokenIndex.from_ranges([(0, TOKENS)], TOKENS)


def _states(*shape: int) -> Tensor:
    return torch.randn(*shape, HEADS, DIM, dtype=torch.float64)


def test_listed_tokens_are_rotated_by_their_own_angles() -> None:
    states = _states(TOKENS)
    rotated = apply_rotary(states, ROTARY)
    for tokens in (SLICE, LIST, EVERYTHING):
        assert torch.equal(take_rotated(tokens, states, ROTARY), tokens.take(rotated))


def test_one_part_comes_back_to_its_tokens() -> None:
    out, lse = _states(LIST.length), torch.randn(LIST.length, HEADS)
    joint, joint_lse = join_parts([out], [lse], [LIST.places], torch.float64)
    assert torch.equal(LIST.take(joint), out)
    assert torch.equal(LIST.take(joint_lse), lse)
    assert not joint[2:4].any()
    assert torch.isneginf(joint_lse[2:4]).all()


def test_parts_join_where_both_are_and_stay_where_one_is() -> None:
    lists, parts = (SLICE, EVERYTHING), []
    for tokens in lists:
        parts.append((_states(tokens.length), torch.randn(tokens.length, HEADS).double()))
    outs, lses = zip(*parts, strict=True)
    joint, lse = join_parts(outs, lses, [tokens.places for tokens in lists], torch.float64)
    shares = [SLICE.take(lses[1]), lses[0]]
    weights = torch.stack(shares).softmax(0).unsqueeze(-1)
    expected = weights[0] * SLICE.take(outs[1]) + weights[1] * outs[0]
    torch.testing.assert_close(SLICE.take(joint), expected, atol=1e-14, rtol=0)
    torch.testing.assert_close(SLICE.take(lse), torch.logaddexp(*shares), atol=1e-14, rtol=0)
    assert torch.equal(joint[4:], outs[1][4:])
    assert torch.equal(lse[4:], lses[1][4:])


def test_gradients_are_rotated_back_and_added() -> None:
    lists = (SLICE, LIST)
    grads = [(_states(tokens.length), _states(tokens.length)) for tokens in lists]
    expected = torch.zeros(2, TOKENS, HEADS, DIM, dtype=torch.float64)
    for tokens, pair in zip(lists, grads, strict=True):
        for total, grad in zip(expected, pair, strict=True):
            tokens.add(total, grad)
    # Turned back after they are added: a rotation is linear, and both lists are rotated.
    turned = apply_rotary(expected[0], BACK)
    places, rotaries = [tokens.places for tokens in lists], [ROTARY, ROTARY]
    keys, values = add_key_gradients(grads, places, rotaries, torch.float64)
    torch.testing.assert_close(keys, turned, atol=1e-14, rtol=0)
    torch.testing.assert_close(values, expected[1], atol=1e-14, rtol=0)
    queries = add_query_gradients([k for k, _ in grads], places, [None, None], torch.bfloat16)
    assert torch.equal(queries, expected[0].bfloat16())
