"""Plans: the parts cover exactly the pairs that the oracle names, each once."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.layers import layer_rules
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.plan.parts import AttentionPlan, Part, plan_attention
from megatron_dattn.attention.reference import pair_masks
from megatron_dattn.attention.visual_config import VisualTokensConfig
from tests.unit.attention.support import (
    CONFIGS,
    RICH_LAYOUT,
    TEXT_ONLY_LAYOUT,
    VARIANTS,
    layouts,
)


def pair_counts(part: Part, plan: AttentionPlan) -> Tensor:
    """How often the part scores each (query token, key token) pair of the pack, int64 [S, S]."""
    packed_tokens = torch.arange(plan.num_tokens)
    queries = part.query_tokens.take(packed_tokens[plan.scored_tokens[0] :]).split(
        part.query_lengths
    )
    keys = part.key_tokens.take(packed_tokens).split(part.key_lengths)
    counts = torch.zeros(plan.num_tokens, plan.num_tokens, dtype=torch.int64)
    for segment_queries, segment_keys in zip(queries, keys, strict=True):
        for place, query in enumerate(segment_queries):
            visible = segment_keys
            if part.causal:
                first = 0 if part.window is None else max(0, place + 1 - part.window)
                visible = segment_keys[first : place + 1]
            counts[query, visible] += 1
    return counts


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=50, deadline=None)
@given(layout=layouts(), window=st.none() | st.integers(1, 8))
def test_parts_score_every_pair_of_the_oracle_once(
    name: str, layout: TokenLayout, window: int | None
) -> None:
    config = CONFIGS[name]
    plan = plan_attention(layout, config, window=window)
    seen, rotated = pair_masks(layout, config, window)
    seen[: plan.scored_tokens[0]] = False  # diagonal tokens have no scores
    for rotary in (False, True):
        parts = [p for p in (*plan.parts, *plan.visual_parts) if p.rotary == rotary]
        counts = sum((pair_counts(part, plan) for part in parts), torch.zeros_like(seen).long())
        assert torch.equal(counts, (seen & (rotated == rotary)).long())


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=25, deadline=None)
@given(layout=layouts(), window=st.none() | st.integers(1, 8))
def test_parts_keep_their_promises(name: str, layout: TokenLayout, window: int | None) -> None:
    plan = plan_attention(layout, CONFIGS[name], window=window)
    for part in (*plan.parts, *plan.visual_parts):
        assert part.query_lengths
        assert min(part.query_lengths + part.key_lengths) >= 1
        assert part.query_tokens.length == sum(part.query_lengths)
        assert part.key_tokens.length == sum(part.key_lengths)
        query_tokens = part.query_tokens.take(torch.arange(layout.num_tokens)).tolist()
        assert len(set(query_tokens)) == len(query_tokens)
        if part.causal:
            assert part.query_lengths == part.key_lengths


def test_s_attn_is_one_causal_part_in_reading_order() -> None:
    plan = plan_attention(RICH_LAYOUT, PRESETS["s_attn"])
    (part,) = plan.parts
    assert (part.causal, part.rotary, plan.num_diagonal_tokens) == (True, True, 0)
    assert part.query_lengths == (13, 3, 6, 3)
    first_sample = part.query_tokens.take(torch.arange(31))[:13].tolist()
    assert first_sample == [15, 16, 0, 1, 2, 3, 4, 17, 18, 19, 5, 6, 7]


def test_dattn_is_unrotated_t2v_and_causal_t2t_of_text_tokens() -> None:
    plan = plan_attention(RICH_LAYOUT, PRESETS["dattn"])
    t2v, t2t = plan.parts
    assert plan.scored_tokens == (15, 31)
    assert (t2v.causal, t2v.rotary, t2t.causal, t2t.rotary) == (False, False, True, True)
    assert (t2v.query_lengths, t2v.key_lengths) == ((5, 4, 1), (8, 2, 2))
    assert t2t.query_lengths == t2t.key_lengths == (5, 3, 4, 1)
    assert t2v.key_cu_seqlens.tolist() == [0, 8, 10, 12]
    assert t2t.query_cu_seqlens.dtype == torch.int32
    # The large tensors, keys and values, are read in place.
    assert t2v.key_tokens.index is None
    assert t2t.key_tokens.index is None


def test_a_merge_of_two_softmaxes_keeps_t2v_apart() -> None:
    plan = plan_attention(RICH_LAYOUT, PRESETS["dattn_sum"])
    assert [part.name for part in plan.parts] == ["T2T"]
    assert [part.name for part in plan.visual_parts] == ["T2V"]
    # Samples 0, 2 and 3 have images; the last three tokens are padding.
    readers = plan.visual_parts[0].query_tokens.places
    assert readers is not None
    assert (readers >= 0).tolist() == [True] * 5 + [False] * 3 + [True] * 5 + [False] * 3


def test_attention_to_the_prompt_needs_a_layout_that_knows_it() -> None:
    layout = replace(RICH_LAYOUT, prompt_lengths=None)
    with pytest.raises(ValueError, match="no prompt_lengths"):
        plan_attention(layout, PRESETS["aki"])


@pytest.mark.parametrize("preset", ["shortv", "exit", "fastervlm"])
@settings(max_examples=50, deadline=None)
@given(layout=layouts(), window=st.none() | st.integers(1, 8))
def test_frozen_visual_tokens_are_read_as_ever(
    preset: str, layout: TokenLayout, window: int | None
) -> None:
    """The text tokens of a layer that leaves visual tokens alone see what they see in S-Attn."""
    frozen = replace(PRESETS[preset], visual=VisualTokensConfig(frozen=(0.0, 1.0)))
    (rule,) = layer_rules(frozen, 1, skip_unread=False)
    plan = plan_attention(layout, rule.attention, window=window)
    assert plan.scored_tokens == (layout.visual_budget, layout.num_tokens)
    whole, _ = pair_masks(layout, PRESETS["s_attn"], window)
    counts = sum((pair_counts(part, plan) for part in plan.parts), torch.zeros_like(whole).long())
    text = slice(layout.visual_budget, None)
    assert torch.equal(counts[text], whole[text].long())


def test_a_window_in_reading_order_costs_a_few_segments() -> None:
    """Not one per text token: a pack of thousands of tokens has plans for every layer."""
    layout = TokenLayout((4000,), (ImageSpan(0, 100, (20, 20)),), 400, 4000)
    plan = plan_attention(layout, VARIANTS["frozen"], window=1000)
    assert sum(len(part.query_lengths) for part in plan.parts) < 10


@pytest.mark.parametrize("preset", PRESETS)
def test_visual_tokens_that_are_gone_are_a_layout_without_images(preset: str) -> None:
    """The plan of the layers after them: over the same tokens, text sees text alone."""
    plan = plan_attention(replace(RICH_LAYOUT, images=()), PRESETS[preset])
    assert plan.num_tokens == RICH_LAYOUT.num_tokens
    assert not plan.visual_parts
    (part,) = plan.parts
    assert part.causal
    assert part.query_lengths == RICH_LAYOUT.text_lengths


def test_a_window_that_hides_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="window of 0 tokens"):
        plan_attention(RICH_LAYOUT, PRESETS["dattn"], window=0)


def test_text_alone_needs_no_t2v() -> None:
    plan = plan_attention(TEXT_ONLY_LAYOUT, PRESETS["dattn"])
    assert [part.name for part in plan.parts] == ["T2T"]


def test_padding_alone_needs_no_parts() -> None:
    empty = TokenLayout((), (), visual_budget=2, text_budget=2)
    assert plan_attention(empty, PRESETS["s_attn"]).parts == ()
