"""Alpha-weighting equals one joint softmax, keyless tokens included; other merges their formula."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from megatron_dattn.attention.config import Merge
from megatron_dattn.attention.merge import alpha_merge, weighted_merge

TOKENS, HEADS, DIM = 5, 3, 4


def softmax_part(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Output [tokens, heads, D] and log-sum-exp [tokens, heads] over the given keys."""
    out = torch.einsum("hqk,khd->qhd", torch.softmax(scores, dim=-1), values)
    return out, torch.logsumexp(scores, dim=-1).T


def keyless_part(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.zeros(TOKENS, HEADS, DIM, dtype=dtype), torch.full((TOKENS, HEADS), -torch.inf)


def scores_and_values(num_keys: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    scores = spread * torch.randn(HEADS, TOKENS, num_keys, dtype=torch.float64)
    return scores, torch.randn(num_keys, HEADS, DIM, dtype=torch.float64)


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_two_parts_make_the_joint_softmax(spread: float) -> None:
    scores, values = scores_and_values(7, spread)
    visual = softmax_part(scores[..., :4], values[:4])
    text = softmax_part(scores[..., 4:], values[4:])
    out, lse = alpha_merge(*visual, *text)
    expected_out, expected_lse = softmax_part(scores, values)
    torch.testing.assert_close(out, expected_out, atol=1e-13, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-13, rtol=1e-13)


def test_three_parts_merge_in_any_order() -> None:
    scores, values = scores_and_values(9)
    parts = [softmax_part(scores[..., i::3], values[i::3]) for i in range(3)]
    expected, _ = softmax_part(scores, values)
    for first, second, third in permutations(parts):
        out, _ = alpha_merge(*alpha_merge(*first, *second), *third)
        torch.testing.assert_close(out, expected, atol=1e-13, rtol=0)


def test_a_keyless_part_changes_nothing() -> None:
    part = softmax_part(*scores_and_values(3))
    for merged in (alpha_merge(*keyless_part(), *part), alpha_merge(*part, *keyless_part())):
        for actual, expected in zip(merged, part, strict=True):
            assert torch.equal(actual, expected)


def test_two_keyless_parts_make_a_keyless_token() -> None:
    out, lse = alpha_merge(*keyless_part(), *keyless_part())
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.isneginf(lse).all()


def test_nan_is_not_hidden() -> None:
    out, lse = softmax_part(*scores_and_values(3))
    poisoned = alpha_merge(out * torch.nan, lse * torch.nan, *keyless_part())
    assert torch.isnan(poisoned[0]).all()
    assert torch.isnan(poisoned[1]).all()


def test_half_precision_parts_merge_in_float32() -> None:
    scores, values = scores_and_values(64)
    visual, text = (softmax_part(scores[..., i::2], values[i::2]) for i in range(2))
    rounded = [x.to(torch.bfloat16) for x in (visual[0], text[0])]
    out, lse = alpha_merge(rounded[0], visual[1].float(), rounded[1], text[1].float())
    assert out.dtype == lse.dtype == torch.float32
    exact, _ = alpha_merge(rounded[0].double(), visual[1], rounded[1].double(), text[1])
    # Float32 arithmetic on the rounded parts: far below one BF16 rounding (4e-3).
    torch.testing.assert_close(out.double(), exact, atol=1e-6, rtol=0)


def test_a_constant_weight_per_head_joins_two_softmaxes() -> None:
    visual, text = torch.randn(2, TOKENS, HEADS, DIM, dtype=torch.float64)
    gate = torch.randn(HEADS, dtype=torch.float64)
    everywhere = torch.ones(TOKENS, dtype=torch.bool)
    weight = gate[:, None].tanh()
    added = weighted_merge(visual, text, "tanh", gate, everywhere)
    torch.testing.assert_close(added, text + weight * visual, atol=1e-14, rtol=0)
    weight = gate[:, None].sigmoid()
    shared = weighted_merge(visual, text, "sigmoid", gate, everywhere)
    torch.testing.assert_close(shared, (1 - weight) * text + weight * visual, atol=1e-14, rtol=0)
    assert torch.equal(weighted_merge(visual, text, "sum", None, everywhere), visual + text)


def test_a_closed_tanh_gate_is_the_language_model_alone() -> None:
    visual, text = torch.randn(2, TOKENS, HEADS, DIM)
    out = weighted_merge(visual, text, "tanh", torch.zeros(1), torch.ones(TOKENS, dtype=torch.bool))
    assert torch.equal(out, text)


@pytest.mark.parametrize("merge", ["sum", "tanh", "sigmoid"])
def test_tokens_without_images_keep_their_text(merge: Merge) -> None:
    text = torch.randn(TOKENS, HEADS, DIM)
    gate = None if merge == "sum" else torch.randn(HEADS)
    nothing = torch.zeros_like(text), text
    out = weighted_merge(*nothing, merge, gate, torch.zeros(TOKENS, dtype=torch.bool))
    assert torch.equal(out, text)


def test_gates_are_computed_in_float32() -> None:
    visual, text = torch.randn(2, TOKENS, HEADS, DIM).bfloat16()
    gate = torch.randn(HEADS).bfloat16()
    out = weighted_merge(visual, text, "tanh", gate, torch.ones(TOKENS, dtype=torch.bool))
    assert out.dtype == torch.bfloat16
    exact = text.double() + gate.double().tanh()[:, None] * visual.double()
    # One rounding to BF16, at most half of 2**-7 of the value.
    torch.testing.assert_close(out.double(), exact, atol=1e-6, rtol=2**-8)
