"""Layouts invert themselves; wrong tensors are listed by name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dattn.conversion.families.mistral import language_rules
from megatron_dattn.conversion.families.siglip import vision_rules
from megatron_dattn.conversion.families.weight_map import (
    GroupedKV,
    GroupedQKV,
    Rule,
    Same,
    Stacked,
    below,
    check_tensors,
    renamed,
)
from megatron_dattn.errors import CheckpointError
from megatron_dattn.models.config import LanguageConfig, VisionConfig

LANGUAGE = LanguageConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    intermediate_size=24,
    vocab_size=32,
)


def shapes_of(rules):
    return {name: shape for rule in rules for name, shape in rule.sources.items()}


@given(groups=st.integers(1, 4), ratio=st.integers(1, 4), head_dim=st.integers(1, 5))
def test_grouped_qkv_splits_what_it_joined(groups, ratio, head_dim):
    layout = GroupedQKV(groups * ratio, groups, head_dim)
    q = torch.randn(groups * ratio * head_dim, 3)
    k, v = torch.randn(groups * head_dim, 3), torch.randn(groups * head_dim, 3)
    for parts in ([q, k, v], [q[:, 0], k[:, 0], v[:, 0]]):
        again = layout.split(layout.join(parts))
        assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_grouped_qkv_interleaves_by_group():
    q, k, v = torch.arange(4), torch.tensor([10, 11]), torch.tensor([20, 21])
    joined = GroupedQKV(num_heads=4, num_groups=2, head_dim=1).join([q, k, v])
    assert joined.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


@given(groups=st.integers(1, 4), head_dim=st.integers(1, 5))
def test_grouped_kv_splits_what_it_joined(groups, head_dim):
    parts = [torch.randn(groups * head_dim, 3), torch.randn(groups * head_dim, 3)]
    again = GroupedKV(groups).split(GroupedKV(groups).join(parts))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_grouped_kv_interleaves_by_group():
    k, v = torch.tensor([10, 11]), torch.tensor([20, 21])
    assert GroupedKV(2).join([k, v]).tolist() == [10, 20, 11, 21]


def test_other_layouts_invert_themselves():
    gate, up = torch.randn(4, 3), torch.randn(4, 3)
    assert all(
        torch.equal(a, b)
        for a, b in zip(Stacked(2).split(Stacked(2).join([gate, up])), [gate, up], strict=True)
    )
    assert torch.equal(Same().join([gate]), gate)


@pytest.mark.parametrize("rules", [language_rules(LANGUAGE), vision_rules(VisionConfig())])
def test_every_rule_fits_its_own_shapes(rules):
    names = [rule.megatron for rule in rules]
    assert len(names) == len(set(names))
    check_tensors(rules, shapes_of(rules), origin="here")
    small = [rule for rule in rules if max(max(shape) for shape in rule.sources.values()) < 64]
    for rule in small:
        parts = [torch.randn(shape) for shape in rule.sources.values()]
        again = rule.layout.split(rule.layout.join(parts))
        assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_problems_are_listed_together_by_name():
    rules = language_rules(LANGUAGE)
    found = shapes_of(rules)
    del found["model.norm.weight"]
    found["model.layers.0.self_attn.rotary_emb.inv_freq"] = (2,)
    found["lm_head.weight"] = (33, 16)
    with pytest.raises(CheckpointError) as caught:
        check_tensors(rules, found, origin="here")
    message = str(caught.value)
    assert "missing model.norm.weight [16]" in message
    assert "unexpected model.layers.0.self_attn.rotary_emb.inv_freq [2]" in message
    assert "lm_head.weight has shape [33, 16], expected [32, 16]" in message


def test_unused_prefixes_are_not_unexpected():
    rules = language_rules(LANGUAGE)
    check_tensors(rules, shapes_of(rules) | {"head.x": (1,)}, unused=("head.",), origin="here")


def test_either_side_of_a_rule_is_renamed_and_nothing_else():
    rule = Rule("qkv", {"q": (2, 3), "k": (1, 3)}, GroupedQKV(2, 1, 1))
    (theirs,) = renamed([rule], below("model."))
    assert theirs == Rule("qkv", {"model.q": (2, 3), "model.k": (1, 3)}, rule.layout)
    (both,) = renamed([rule], str.upper, megatron=below("decoder."))
    assert both == Rule("decoder.qkv", {"Q": (2, 3), "K": (1, 3)}, rule.layout)
    assert renamed([rule]) == [rule]
