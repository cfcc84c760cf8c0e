"""Decomposed attention on the flash kernels of this machine against the float64 oracle.

Run on a GPU machine with `pytest -m gpu tests/gpu`.
"""

from dataclasses import replace

import pytest
import torch

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.backends.base import Backend, ScoreFunction
from megatron_dattn.attention.backends.select import BACKENDS, select_backend
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.plan.parts import plan_attention
from tests.unit.attention.naive import constant_alpha_gradients
from tests.unit.attention.support import (
    RICH_LAYOUT,
    TEXT_ONLY_LAYOUT,
    assert_close_norm,
    make_problem,
    run_fast,
    run_oracle,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Longer than a kernel tile (128 tokens) in queries and keys, ragged, with a text-only sample.
LONG_LAYOUT = TokenLayout(
    (150, 40, 3),
    (ImageSpan(0, 20, (12, 17)), ImageSpan(0, 20, (3, 5)), ImageSpan(2, 3, (13, 13))),
    visual_budget=400,
    text_budget=200,
    prompt_lengths=(60, 10, 3),
)
LAYOUTS = {"rich": RICH_LAYOUT, "text-only": TEXT_ONLY_LAYOUT, "long": LONG_LAYOUT}
KERNELS = ["cuda_flash", "flash_attn2", "flash_attn3"]
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


def backend_named(kernel: str, head_dim: int = 64, softcap: float | None = None) -> Backend:
    """The backend for BF16; skips the test, with the reason, where it cannot run."""
    reason = BACKENDS[kernel].unsupported(torch.device("cuda"), torch.bfloat16, head_dim, softcap)
    if reason is not None:
        pytest.skip(f"{kernel}: {reason}")
    return select_backend(kernel, "cuda", torch.bfloat16, head_dim, softcap=softcap)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("preset", PRESETS)
@every_kernel
def test_flash_stays_near_the_oracle(
    kernel: str, preset: str, group: int, head_dim: int, layout: str
) -> None:
    backend = backend_named(kernel, head_dim)
    config = PRESETS[preset]
    dtype = torch.bfloat16
    problem = make_problem(LAYOUTS[layout], config, dtype, group=group, head_dim=head_dim)
    actual = run_fast(problem.to(dtype, "cuda"), LAYOUTS[layout], config, backend)
    for got, expected in zip(actual, run_oracle(problem, LAYOUTS[layout], config), strict=True):
        assert got.dtype == dtype
        # BF16 keeps 8 bits: each of a few roundings (rotation, probabilities, partial outputs,
        # gradients) errs by up to 4e-3.
        assert_close_norm(got, expected, problem.grad_out, 2e-2)


@pytest.mark.parametrize("window", [1, 7, 64, 130])
@pytest.mark.parametrize("preset", ["s_attn", "dattn"])
@every_kernel
def test_a_sliding_window_stays_near_the_oracle(kernel: str, preset: str, window: int) -> None:
    backend = backend_named(kernel)
    config, dtype = PRESETS[preset], torch.bfloat16
    problem = make_problem(LONG_LAYOUT, config, dtype, group=4, head_dim=64)
    moved = problem.to(dtype, "cuda")
    actual = run_fast(moved, LONG_LAYOUT, config, backend, window=window)
    exact = run_oracle(problem, LONG_LAYOUT, config, window=window)
    for got, expected in zip(actual, exact, strict=True):
        assert_close_norm(got, expected, problem.grad_out, 2e-2)


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("preset", ["s_attn", "dattn", "dattn_sum"])
@every_kernel
def test_a_softcap_stays_near_the_oracle(kernel: str, preset: str, window: int | None) -> None:
    backend = backend_named(kernel, 256, softcap=2.0)
    config, dtype = PRESETS[preset], torch.bfloat16
    problem = make_problem(LONG_LAYOUT, config, dtype, group=2, head_dim=256)
    rules = {"softcap": 2.0, "window": window}
    actual = run_fast(problem.to(dtype, "cuda"), LONG_LAYOUT, config, backend, **rules)
    for got, expected in zip(
        actual, run_oracle(problem, LONG_LAYOUT, config, **rules), strict=True
    ):
        assert_close_norm(got, expected, problem.grad_out, 2e-2)


@pytest.mark.parametrize("preset", PRESETS)
def test_matrix_products_on_the_gpu_are_exact(preset: str) -> None:
    config = PRESETS[preset]
    problem = make_problem(RICH_LAYOUT, config)
    backend = select_backend("math", "cuda", torch.float64, 8)
    actual = run_fast(problem.to(torch.float64, "cuda"), RICH_LAYOUT, config, backend)
    for got, expected in zip(actual, run_oracle(problem, RICH_LAYOUT, config), strict=True):
        torch.testing.assert_close(got.cpu(), expected, atol=1e-12, rtol=0)


@every_kernel
def test_tokens_without_keys_are_reported_as_minus_infinity(kernel: str) -> None:
    backend = backend_named(kernel)
    config = PRESETS["dattn"]
    t2v = plan_attention(RICH_LAYOUT, config, "cuda").parts[0]
    keyless_first = replace(t2v, key_lengths=(0, 8, 4))
    problem = make_problem(RICH_LAYOUT, config, head_dim=64).to(torch.bfloat16, "cuda")
    query = t2v.query_tokens.take(problem.query[RICH_LAYOUT.visual_budget :])
    key, value = (t2v.key_tokens.take(x) for x in (problem.key, problem.value))
    with torch.no_grad():
        out, lse = backend.forward(query, key, value, keyless_first, ScoreFunction(1.0))
    assert torch.isneginf(lse[:5]).all()
    assert not out[:5].any()
    assert torch.isfinite(lse[5:]).all()


@every_kernel
def test_a_constant_alpha_gives_wrong_gradients(kernel: str) -> None:
    """The negative control: what autograd through alpha would give with this kernel."""
    backend = backend_named(kernel)
    config = PRESETS["dattn"]
    problem = make_problem(LONG_LAYOUT, config, torch.bfloat16, head_dim=64)
    with torch.no_grad():
        problem.query.mul_(3.0)  # sharper attention, where alpha moves more
    moved = problem.to(torch.bfloat16, "cuda")
    wrong = constant_alpha_gradients(moved, LONG_LAYOUT, config, backend)
    exact = run_oracle(problem, LONG_LAYOUT, config)
    for got, expected in zip(wrong, exact[1:3], strict=True):
        # Five times what rounding explains (test_flash_stays_near_the_oracle).
        assert (got.double().cpu() - expected).norm() > 0.1 * expected.norm()
