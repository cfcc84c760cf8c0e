"""Decomposed attention against the oracle: output, all gradients, and who can influence whom."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.backends.base import Backend
from megatron_dattn.attention.backends.select import select_backend
from megatron_dattn.attention.decomposed import (
    attend_scored_tokens,
    decomposed_attention,
    diagonal_attention,
)
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.plan.parts import plan_attention
from megatron_dattn.attention.reference import pair_masks
from tests.unit.attention.naive import constant_alpha_gradients, naive_attention
from tests.unit.attention.support import (
    CONFIGS,
    HEAD_DIM,
    RICH_LAYOUT,
    SCORES,
    TEXT_ONLY_LAYOUT,
    Problem,
    assert_close_norm,
    fast_output,
    layouts,
    make_problem,
    run_fast,
    run_oracle,
)

CPU_BACKENDS = ["math", "cpu_flash"]
every_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)
every_preset = pytest.mark.parametrize("preset", PRESETS)


def backend_named(name: str) -> Backend:
    return select_backend(name, "cpu", torch.float64, HEAD_DIM)


@every_backend
@every_preset
@settings(max_examples=40, deadline=None)
@given(layout=layouts(), group=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_float64_equals_the_oracle(
    preset: str, backend: str, layout: TokenLayout, group: int, seed: int
) -> None:
    config = PRESETS[preset]
    problem = make_problem(layout, config, group=group, seed=seed)
    actual = run_fast(problem, layout, config, backend_named(backend))
    for got, expected in zip(actual, run_oracle(problem, layout, config), strict=True):
        # A few hundred float64 roundings of numbers of order 1 to 10.
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("backend", "softcap"), [("math", 1.5), ("math", None), ("cpu_flash", None)]
)
@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=15, deadline=None)
@given(layout=layouts(), window=st.integers(1, 8))
def test_softcaps_and_sliding_windows_equal_the_oracle(
    name: str, backend: str, softcap: float | None, layout: TokenLayout, window: int
) -> None:
    config = CONFIGS[name]
    problem = make_problem(layout, config)
    rules = {"softcap": softcap, "window": window}
    actual = run_fast(problem, layout, config, backend_named(backend), **rules)
    for got, expected in zip(actual, run_oracle(problem, layout, config, **rules), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


# Float32: 6e-8 per rounding, logits up to 10, sums of some ten terms. BF16: inputs are shared with
# the oracle, but rotated queries and keys, the output and the gradients are rounded to 8 bits
# (4e-3 at most each), and softmax carries the first of these on to all gradients.
@every_backend
@every_preset
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@settings(max_examples=8, deadline=None)
@given(layout=layouts(), group=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_lower_precision_stays_near_the_oracle(
    preset: str,
    backend: str,
    dtype: torch.dtype,
    tolerance: float,
    layout: TokenLayout,
    group: int,
    seed: int,
) -> None:
    config = PRESETS[preset]
    problem = make_problem(layout, config, dtype, group=group, seed=seed)
    actual = run_fast(problem, layout, config, backend_named(backend))
    for got, expected in zip(actual, run_oracle(problem, layout, config), strict=True):
        assert got.dtype == dtype
        assert_close_norm(got, expected, problem.grad_out, tolerance)


@every_backend
@every_preset
def test_large_logits_stay_finite_and_exact(preset: str, backend: str) -> None:
    config = PRESETS[preset]
    problem = make_problem(RICH_LAYOUT, config)
    with torch.no_grad():
        problem.query.mul_(100.0)
    actual = run_fast(problem, RICH_LAYOUT, config, backend_named(backend))
    for got, expected in zip(actual, run_oracle(problem, RICH_LAYOUT, config), strict=True):
        # Logits of some hundreds: their float64 rounding is 1e-13, times keys and queries.
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


@every_backend
@every_preset
def test_gradcheck(preset: str, backend: str) -> None:
    config = PRESETS[preset]
    problem = make_problem(RICH_LAYOUT, config, group=2)
    plan = plan_attention(RICH_LAYOUT, config)

    def attention(query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None = None) -> Tensor:
        moved = replace(problem, query=query, key=key, value=value, gate=gate)
        return fast_output(moved, plan, backend_named(backend))

    assert torch.autograd.gradcheck(attention, problem.differentiable, fast_mode=True)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def test_autograd_through_alpha_without_the_lse_gradient_is_wrong() -> None:
    """The negative control: a flash kernel's log-sum-exp is a constant to autograd."""
    config = PRESETS["dattn"]
    problem = make_problem(RICH_LAYOUT, config)
    expected = run_oracle(problem, RICH_LAYOUT, config)

    def errors(*, lse_has_gradient: bool) -> list[float]:
        out = naive_attention(problem, RICH_LAYOUT, config, lse_has_gradient=lse_has_gradient)
        gradients = torch.autograd.grad(out, problem.inputs, problem.grad_out)
        actual = [out, *gradients]
        return [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]

    out, query, key, value = errors(lse_has_gradient=False)
    assert out < 1e-12
    assert value < 1e-12
    assert query > 0.05
    assert key > 0.05
    # And that gradient is all that is missing.
    assert max(errors(lse_has_gradient=True)) < 1e-12


@every_backend
def test_a_kernel_whose_alpha_is_a_constant_gives_wrong_gradients(backend: str) -> None:
    """The same control with the real kernels."""
    config = PRESETS["dattn"]
    problem = make_problem(RICH_LAYOUT, config)
    wrong = constant_alpha_gradients(problem, RICH_LAYOUT, config, backend_named(backend))
    out = naive_attention(problem, RICH_LAYOUT, config, lse_has_gradient=False)
    by_autograd = torch.autograd.grad(out, (problem.query, problem.key), problem.grad_out)
    expected = run_oracle(problem, RICH_LAYOUT, config)[1:3]
    for gradient, same_mistake, right in zip(wrong, by_autograd, expected, strict=True):
        torch.testing.assert_close(gradient, same_mistake, atol=1e-12, rtol=0)
        assert relative_error(gradient, right) > 0.05


def outputs(problem: Problem, value: Tensor, layout: TokenLayout, preset: str) -> Tensor:
    plan = plan_attention(layout, PRESETS[preset])
    with torch.no_grad():
        return fast_output(replace(problem, value=value), plan, backend_named("cpu_flash"))


@every_preset
def test_a_token_moves_exactly_the_tokens_that_see_it(preset: str) -> None:
    """No leak between samples, through padding, or past a causal or diagonal mask."""
    layout, config = RICH_LAYOUT, PRESETS[preset]
    seen, _ = pair_masks(layout, config)
    if config.v2v == "diagonal":
        visual = torch.arange(layout.visual_budget)
        seen[visual, visual] = True  # visual padding repeats its own value too
    problem = make_problem(layout, config)
    before = outputs(problem, problem.value, layout, preset)
    for token in range(layout.num_tokens):
        moved_value = problem.value.detach().clone()
        moved_value[token] += 100.0
        after = outputs(problem, moved_value, layout, preset)
        moved = (after != before).flatten(1).any(dim=1)
        assert moved.tolist() == seen[:, token].tolist(), f"token {token}"


@pytest.mark.parametrize(
    "preset", [name for name, config in PRESETS.items() if not config.scores_visual_tokens]
)
def test_an_unscored_visual_token_never_changes_another(preset: str) -> None:
    """Neither through its query, its key nor its value."""
    layout = RICH_LAYOUT
    problem = make_problem(layout, PRESETS[preset])
    before = outputs(problem, problem.value, layout, preset)[: layout.visual_budget]
    for token in range(layout.visual_budget):
        moved = problem.to(torch.float64)
        with torch.no_grad():
            for tensor in moved.inputs:
                tensor[token] += 100.0
        after = outputs(moved, moved.value, layout, preset)[: layout.visual_budget]
        changed = (after != before).flatten(1).any(dim=1)
        own = [] if PRESETS[preset].v2v == "none" else [token]
        assert changed.nonzero().flatten().tolist() == own


@every_preset
def test_padding_is_finite_and_gives_and_takes_nothing(preset: str) -> None:
    layout, config = RICH_LAYOUT, PRESETS[preset]
    problem = make_problem(layout, config)
    visual = range(layout.num_visual_tokens, layout.visual_budget)
    text = range(layout.visual_budget + layout.num_text_tokens, layout.num_tokens)
    padding = [*visual, *text]
    problem.grad_out[padding] = 0.0  # no loss is taken there
    out, *gradients = run_fast(problem, layout, config, backend_named("cpu_flash"))
    assert torch.isfinite(out).all()
    if config.v2v != "diagonal":
        assert not out[padding].any()
    for gradient in gradients[:3]:
        assert not gradient[padding].any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_gives_the_same_gradients(reentrant: bool) -> None:
    config = PRESETS["dattn"]
    problem = make_problem(RICH_LAYOUT, config)
    plan = plan_attention(RICH_LAYOUT, config)

    def attention(*inputs: Tensor) -> Tensor:
        return decomposed_attention(
            *inputs,
            plan,
            problem.rotary,
            score_function=SCORES,
            backend=backend_named("cpu_flash"),
        )

    def gradients(out: Tensor) -> list[Tensor]:
        for tensor in problem.inputs:
            tensor.grad = None
        out.backward(problem.grad_out)
        return [tensor.grad for tensor in problem.inputs if tensor.grad is not None]

    stored = gradients(attention(*problem.inputs))
    recomputed = gradients(checkpoint(attention, *problem.inputs, use_reentrant=reentrant))
    assert len(stored) == len(recomputed) == 3
    for got, expected in zip(recomputed, stored, strict=True):
        assert torch.equal(got, expected)


def test_one_plan_serves_several_layers() -> None:
    config = PRESETS["dattn"]
    problem = make_problem(RICH_LAYOUT, config, group=1)
    plan = plan_attention(RICH_LAYOUT, config)
    states = problem.value
    for _ in range(2):
        states = decomposed_attention(
            states,
            states,
            states,
            plan,
            problem.rotary,
            score_function=SCORES,
            backend=backend_named("cpu_flash"),
        )
    (gradient,) = torch.autograd.grad(states, problem.value, problem.grad_out)
    assert torch.isfinite(gradient).all()
    assert gradient.any()


def test_scored_tokens_can_be_computed_without_visual_queries() -> None:
    config = PRESETS["dattn"]
    problem = make_problem(RICH_LAYOUT, config)
    plan = plan_attention(RICH_LAYOUT, config)
    backend = backend_named("cpu_flash")
    arguments = (problem.key, problem.value, plan, problem.rotary)
    whole = decomposed_attention(problem.query, *arguments, score_function=SCORES, backend=backend)
    text = attend_scored_tokens(
        problem.query[15:], *arguments, score_function=SCORES, backend=backend
    )
    visual = diagonal_attention(problem.value[:15], num_query_heads=4)
    assert torch.equal(whole, torch.cat((visual, text)))


@every_preset
def test_a_pack_without_images_or_without_anything_works(preset: str) -> None:
    config = PRESETS[preset]
    nothing = TokenLayout((), (), visual_budget=1, text_budget=3)
    for layout in (TEXT_ONLY_LAYOUT, nothing):
        problem = make_problem(layout, config)
        actual = run_fast(problem, layout, config, backend_named("cpu_flash"))
        for got, expected in zip(actual, run_oracle(problem, layout, config), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@every_backend
@pytest.mark.parametrize("merge", ["alpha", "sum", "tanh", "sigmoid"])
def test_only_a_joint_softmax_ties_visual_gradients_to_the_text(merge: str, backend: str) -> None:
    """Otherwise T2V has its own (out, lse), whatever the scores of T2T are."""
    config = PRESETS["dattn" if merge == "alpha" else f"dattn_{merge}"]
    visual = slice(0, RICH_LAYOUT.num_visual_tokens)
    gradients = []
    for factor in (1.0, 3.0):
        problem = make_problem(RICH_LAYOUT, config)
        with torch.no_grad():
            problem.key[RICH_LAYOUT.visual_budget :] *= factor
        _, _, grad_key, *_ = run_fast(problem, RICH_LAYOUT, config, backend_named(backend))
        gradients.append(grad_key[visual])
    if merge == "alpha":
        assert relative_error(*gradients) > 0.05
    else:
        assert torch.equal(*gradients)


@pytest.mark.parametrize("preset", ["dattn_tanh", "dattn_sigmoid"])
def test_a_gate_without_images_has_a_gradient_of_zero(preset: str) -> None:
    """A data-parallel reduction waits for the gates of every rank."""
    config = PRESETS[preset]
    problem = make_problem(TEXT_ONLY_LAYOUT, config)
    *_, gradient = run_fast(problem, TEXT_ONLY_LAYOUT, config, backend_named("cpu_flash"))
    assert gradient.shape == (4,)
    assert not gradient.any()


def test_one_gate_may_serve_all_heads() -> None:
    config = PRESETS["dattn_sigmoid"]
    problem = make_problem(RICH_LAYOUT, config)
    out, *_ = run_fast(problem, RICH_LAYOUT, config, backend_named("cpu_flash"))
    problem.gate = torch.full((1,), 0.3, dtype=torch.float64, requires_grad=True)
    scalar, *_, gradient = run_fast(problem, RICH_LAYOUT, config, backend_named("cpu_flash"))
    problem.gate = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
    heads, *_, gradients = run_fast(problem, RICH_LAYOUT, config, backend_named("cpu_flash"))
    assert torch.equal(scalar, heads)
    assert not torch.equal(scalar, out)
    torch.testing.assert_close(gradient, gradients.sum(0, keepdim=True), atol=1e-12, rtol=0)


@pytest.mark.parametrize("preset", ["dattn", "dattn_sum", "dattn_tanh"])
def test_a_gate_where_none_belongs_and_its_absence_are_refused(preset: str) -> None:
    config = PRESETS[preset]
    problem = make_problem(RICH_LAYOUT, config)
    problem.gate = None if config.has_gate else torch.zeros(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"merge '{config.merge}'"):
        run_fast(problem, RICH_LAYOUT, config, backend_named("math"))


def test_tensors_of_another_pack_are_refused() -> None:
    config = PRESETS["dattn"]
    problem = make_problem(RICH_LAYOUT, config)
    plan = plan_attention(TEXT_ONLY_LAYOUT, config)
    with pytest.raises(ValueError, match=r"\(29, 31, 31\) tokens; the plan is for \(6, 8, 8\)"):
        decomposed_attention(
            *problem.inputs,
            plan,
            problem.rotary,
            score_function=SCORES,
            backend=backend_named("math"),
        )


def test_heads_that_do_not_form_groups_are_refused() -> None:
    plan = plan_attention(TEXT_ONLY_LAYOUT, PRESETS["s_attn"])
    query, key = torch.randn(8, 3, 4), torch.randn(8, 2, 4)
    rotary = (torch.ones(8, 4), torch.zeros(8, 4))
    with pytest.raises(ValueError, match="do not form groups"):
        decomposed_attention(
            query,
            key,
            key,
            plan,
            rotary,
            score_function=SCORES,
            backend=backend_named("math"),
        )


@pytest.mark.parametrize("preset", ["s_attn", "dattn", "dattn_sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_segments_on_the_cpus_flash_kernel(preset: str, dtype: torch.dtype) -> None:
    """Wide enough for the kernel's own BF16 arithmetic, ragged so that there is padding too."""
    images = (ImageSpan(0, 3, (15, 20)), ImageSpan(1, 0, (14, 20)))
    layout = TokenLayout((150, 160), images, visual_budget=600, text_budget=320)
    config = PRESETS[preset]
    problem = make_problem(layout, config, dtype, group=4, head_dim=16)
    backend = select_backend("cpu_flash", "cpu", dtype, 16)
    # BF16: probabilities and outputs of each part are rounded to 8 bits (4e-3), and gradients of
    # keys are summed over heads in BF16.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    actual = run_fast(problem, layout, config, backend)
    for got, expected in zip(actual, run_oracle(problem, layout, config), strict=True):
        assert_close_norm(got, expected, problem.grad_out, tolerance)
