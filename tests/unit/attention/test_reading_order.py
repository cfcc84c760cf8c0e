"""A pack as text alone shows every token the same tokens, at the same positions."""

import pytest
import torch
from hypothesis import given

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.layers import layer_rules
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.plan.parts import plan_attention
from megatron_dattn.attention.positions import token_positions
from megatron_dattn.attention.reading_order import knows_one_kind, reading_order
from tests.unit.attention.support import RICH_LAYOUT, layouts


def test_tokens_stand_as_they_are_read() -> None:
    order = reading_order(RICH_LAYOUT)
    assert order.layout.text_lengths == (13, 3, 6, 3)
    # Two text tokens, the images of 4 and 1 patches after them, three more, an image of 3.
    assert order.tokens[:13].tolist() == [15, 16, 0, 1, 2, 3, 4, 17, 18, 19, 5, 6, 7]
    assert order.tokens[25:].tolist() == [12, 13, 14, 28, 29, 30]  # padding of either kind


@given(layouts())
def test_every_token_has_one_place(layout: TokenLayout) -> None:
    order = reading_order(layout)
    assert order.tokens.sort().values.tolist() == list(range(layout.num_tokens))
    assert torch.equal(order.places[order.tokens], torch.arange(layout.num_tokens))


@given(layouts())
def test_attention_and_positions_are_those_of_the_pack(layout: TokenLayout) -> None:
    config, order = PRESETS["s_attn"], reading_order(layout)
    (packed,), (text,) = (plan_attention(x, config).parts for x in (layout, order.layout))
    tokens = packed.query_tokens.take(torch.arange(layout.num_tokens))
    assert torch.equal(order.tokens[: len(tokens)], tokens)
    assert text.query_tokens.index is None
    assert text.query_tokens.start == 0
    assert (text.query_lengths, text.causal) == (packed.query_lengths, packed.causal)
    positions = token_positions(layout, config)
    assert torch.equal(token_positions(order.layout, config), positions[order.tokens])


@pytest.mark.parametrize("preset", PRESETS)
def test_who_knows_one_kind(preset: str) -> None:
    config = PRESETS[preset]
    expected = preset in ("s_attn", "fastervlm")
    assert knows_one_kind(config, layer_rules(config, 4, skip_unread=True)) is expected
