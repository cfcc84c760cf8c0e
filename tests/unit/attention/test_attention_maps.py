"""What reports say of a layer's attention, against one dense softmax in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dattn.attention import PRESETS, AttentionConfig
from megatron_dattn.attention.attention_maps import (
    ReportInputs,
    alpha_v,
    image_attention,
    plan_report,
)
from megatron_dattn.attention.backends.base import ScoreFunction
from megatron_dattn.attention.backends.select import select_backend
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.positions import apply_rotary
from megatron_dattn.attention.reference import pair_masks
from tests.unit.attention.support import (
    CONFIGS,
    HEAD_DIM,
    RICH_LAYOUT,
    SCALE,
    TEXT_ONLY_LAYOUT,
    Problem,
    layouts,
    make_problem,
)

Rules = dict[str, float | int | None]
every_config = pytest.mark.parametrize("name", CONFIGS)
every_preset = pytest.mark.parametrize("preset", PRESETS)


def inputs_of(
    problem: Problem,
    layout: TokenLayout,
    config: AttentionConfig,
    backend: str = "math",
    *,
    softcap: float | None = None,
    window: int | None = None,
) -> ReportInputs:
    plan = plan_report(layout, config, window=window)
    dtype = problem.query.dtype
    chosen = select_backend(backend, "cpu", dtype, HEAD_DIM, softcap=softcap)
    return ReportInputs(plan, problem.rotary, ScoreFunction(SCALE, softcap), chosen)


def dense_masses(
    problem: Problem,
    layout: TokenLayout,
    config: AttentionConfig,
    *,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """exp(score) of every text token with every token it sees, [text, Hq, S] (0 where it does not),
    and whether it sees an image."""
    seen, rotated = pair_masks(layout, config, window)
    query = problem.query.double()
    key = problem.key.double().repeat_interleave(query.shape[1] // problem.key.shape[1], dim=1)
    turned = [apply_rotary(tokens, problem.rotary) for tokens in (query, key)]
    plain = torch.einsum("qhd,khd->qhk", query, key)
    scores = torch.where(rotated.unsqueeze(1), torch.einsum("qhd,khd->qhk", *turned), plain) * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    masses = torch.exp(scores) * seen.unsqueeze(1)
    text = slice(layout.visual_budget, None)
    return masses[text].detach(), seen[text, : layout.visual_budget].any(1)


RULES = st.fixed_dictionaries(
    {"softcap": st.sampled_from([None, 1.5]), "window": st.none() | st.integers(1, 8)}
)


@every_config
@settings(max_examples=25, deadline=None)
@given(layout=layouts(), group=st.sampled_from([1, 2]), rules=RULES)
def test_the_visual_weight_is_the_share_of_the_softmax(
    name: str, layout: TokenLayout, group: int, rules: Rules
) -> None:
    config = CONFIGS[name]
    problem = make_problem(layout, config, group=group)
    masses, sees = dense_masses(problem, layout, config, **rules)
    inputs = inputs_of(problem, layout, config, **rules)
    actual = alpha_v(problem.query, problem.key, inputs)
    expected = masses[..., : layout.visual_budget].sum(-1) / masses.sum(-1)
    # Shares of sums of some ten exponentials in float64; padding has 0 / 0.
    torch.testing.assert_close(actual, expected.nan_to_num(), atol=1e-12, rtol=0)
    assert torch.equal(inputs.plan.sees_images, sees)
    assert inputs.plan.num_seeing == sees.sum()
    assert not actual[~sees].any()
    assert actual[sees].gt(0).all()


@every_config
@settings(max_examples=25, deadline=None)
@given(layout=layouts(), rules=RULES, data=st.data())
def test_the_maps_are_the_softmaxs_probabilities(
    name: str, layout: TokenLayout, rules: Rules, data: st.DataObject
) -> None:
    config = CONFIGS[name]
    problem = make_problem(layout, config)
    sample = data.draw(st.integers(0, layout.num_samples - 1))
    own = range(*(layout.text_cu_seqlens[sample + i] for i in (0, 1)))
    tokens = data.draw(st.lists(st.sampled_from(own), min_size=1, max_size=4))
    masses, sees = dense_masses(problem, layout, config, **rules)
    inputs = inputs_of(problem, layout, config, **rules)
    actual = image_attention(problem.query, problem.key, inputs, tokens)
    images = masses[tokens][..., slice(*layout.visual_tokens(sample))]
    total = masses[tokens].sum(-1) if config.merge == "alpha" else images.sum(-1)
    expected = (images / total.unsqueeze(-1)).nan_to_num()
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    weights = alpha_v(problem.query, problem.key, inputs)[tokens]
    if config.merge != "alpha":
        weights = sees[tokens].double().unsqueeze(1).expand_as(weights)
    torch.testing.assert_close(actual.sum(-1), weights, atol=1e-12, rtol=0)


@every_preset
def test_queries_of_visual_tokens_are_not_read(preset: str) -> None:
    config = PRESETS[preset]
    problem = make_problem(RICH_LAYOUT, config)
    inputs = inputs_of(problem, RICH_LAYOUT, config)
    text = problem.query[RICH_LAYOUT.visual_budget :]
    for report in (alpha_v, lambda *args: image_attention(*args, [0, 3])):
        whole = report(problem.query, problem.key, inputs)
        assert torch.equal(whole, report(text, problem.key, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["s_attn", "dattn", "dattn_sum"])
def test_lower_precision_is_reported_in_float32(preset: str, dtype: torch.dtype) -> None:
    config = PRESETS[preset]
    problem = make_problem(RICH_LAYOUT, config, dtype)
    masses, _ = dense_masses(problem, RICH_LAYOUT, config)
    expected = masses[..., : RICH_LAYOUT.visual_budget].sum(-1) / masses.sum(-1)
    inputs = inputs_of(problem, RICH_LAYOUT, config, "cpu_flash")
    actual = alpha_v(problem.query, problem.key, inputs)
    assert actual.dtype == torch.float32
    assert not actual.requires_grad
    # Rotated queries and keys keep the dtype: for BF16, 8 bits of logits up to about 3.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected.nan_to_num().float(), atol=tolerance, rtol=0)
    maps = image_attention(problem.query, problem.key, inputs, [0])
    assert maps.dtype == torch.float32
    nothing_seen = inputs_of(problem, RICH_LAYOUT, config, "cpu_flash")
    nothing_seen = replace(nothing_seen, plan=replace(nothing_seen.plan, t2v=()))
    maps = image_attention(problem.query, problem.key, nothing_seen, [0])
    assert maps.dtype == torch.float32
    assert not maps.any()


@every_preset
def test_a_pack_without_images_has_no_weight(preset: str) -> None:
    config = PRESETS[preset]
    problem = make_problem(TEXT_ONLY_LAYOUT, config)
    inputs = inputs_of(problem, TEXT_ONLY_LAYOUT, config)
    assert inputs.plan.num_seeing == 0
    assert not alpha_v(problem.query, problem.key, inputs).any()
    assert image_attention(problem.query, problem.key, inputs, [0, 1]).shape == (2, 4, 0)


@pytest.mark.parametrize("tokens", [[], [4, 5], [13]], ids=["none", "two samples", "padding"])
def test_maps_are_of_one_sample(tokens: list[int]) -> None:
    config = PRESETS["dattn"]
    problem = make_problem(RICH_LAYOUT, config)
    inputs = inputs_of(problem, RICH_LAYOUT, config)
    with pytest.raises(ValueError, match="are not of one sample"):
        image_attention(problem.query, problem.key, inputs, tokens)
