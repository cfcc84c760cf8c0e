"""Keys that several segments read: their gradients are rounded to BF16 once, not at every addition.

A patch under YOPO's windows is a key of 25 segments, a patch of EE-MLLM one of every run of text
behind it. The numbers below are chosen so that all terms of a gradient have one sign: what a sum in
BF16 loses then shows in every token.
"""

import pytest
import torch
from torch import Tensor

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.backends.select import select_backend
from megatron_dattn.attention.decomposed import decomposed_attention
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.plan.parts import plan_attention
from megatron_dattn.attention.reference import reference_attention
from tests.unit.attention.support import SCORES, Problem, make_problem

# One image with whole windows and rings, and many behind it, each between two words.
LAYOUT = TokenLayout(
    text_lengths=(64,),
    images=(ImageSpan(0, 4, (9, 9)), *(ImageSpan(0, 2 * i + 6, (1, 2)) for i in range(24))),
    visual_budget=9 * 9 + 24 * 2,
    text_budget=64,
    prompt_lengths=(60,),
)
SHARING = ("ee_mllm", "naavit", "saisa", "aki", "cca", "yopo", "s_attn_debias")
# Half a unit in the last of BF16's 8 digits, and float32's own roundings on top.
ONE_ROUNDING = 2**-8 + 1e-4


def _one_signed(preset: str) -> Problem:
    """Equal keys share a token's attention evenly; queries and what comes back are positive; values
    of even tokens are 1 and of odd tokens -1, which gives the keys' gradients the sign of their
    token."""
    problem = make_problem(LAYOUT, PRESETS[preset], torch.bfloat16, group=1)
    signs = 1.0 - 2.0 * (torch.arange(LAYOUT.num_tokens) % 2)
    with torch.no_grad():
        problem.query.abs_()
        problem.key.zero_()
        problem.value.copy_(signs[:, None, None].expand_as(problem.value))
        problem.grad_out.abs_()
        if PRESETS[preset].v2v == "diagonal":  # equation 2 adds its own, rounded, term
            problem.grad_out[: LAYOUT.visual_budget] = 0.0
    return problem


def _largest_relative_error(actual: Tensor, expected: Tensor) -> float:
    read = expected.abs() > 1e-9  # a token that sees one value alone has no gradient at all
    assert read.any()
    return ((actual.double() - expected).abs()[read] / expected.abs()[read]).max().item()


@pytest.mark.parametrize("preset", SHARING)
def test_gradients_of_shared_keys_are_rounded_once(preset: str) -> None:
    config, problem = PRESETS[preset], _one_signed(preset)
    unrotated = torch.ones(LAYOUT.num_tokens, 8), torch.zeros(LAYOUT.num_tokens, 8)
    plan = plan_attention(LAYOUT, config)
    backend = select_backend("math", "cpu", torch.bfloat16, 8)
    out = decomposed_attention(
        *problem.inputs, plan, unrotated, score_function=SCORES, backend=backend
    )
    actual = torch.autograd.grad(out, problem.inputs, problem.grad_out)
    exact = problem.to(torch.float64)
    expected_out = reference_attention(
        *exact.inputs, LAYOUT, config, unrotated, score_function=SCORES
    )
    expected = torch.autograd.grad(expected_out, exact.inputs, exact.grad_out)
    for got, right in zip(actual[1:], expected[1:], strict=True):
        assert got.dtype == torch.bfloat16
        assert _largest_relative_error(got, right) < ONE_ROUNDING


@pytest.mark.parametrize("preset", PRESETS)
def test_wider_sums_are_kept_for_shared_keys_alone(preset: str) -> None:
    """Where every key has one segment, its gradient needs no second buffer."""
    plan = plan_attention(LAYOUT, PRESETS[preset])
    assert plan.parts_share_keys == (preset in SHARING)
    assert not plan.visual_parts_share_keys
    one_image = TokenLayout(
        (6,), (ImageSpan(0, 2, (2, 2)),), visual_budget=4, text_budget=6, prompt_lengths=(4,)
    )
    plan = plan_attention(one_image, PRESETS[preset])
    assert plan.parts_share_keys == (preset in ("aki", "cca", "yopo", "s_attn_debias"))
