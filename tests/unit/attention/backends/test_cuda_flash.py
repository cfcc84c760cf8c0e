"""The CUDA backend's bookkeeping, on a stand-in for the kernel that keeps its conventions.

The stand-in computes in float64 what the kernel promises: segments by boundaries, causal masks
aligned at the bottom right, log-sum-exps [heads, rows] with +inf for rows without keys, gradients
from the (out, lse) it is given. The kernel itself is tested in tests/gpu.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.backends import cuda_flash
from megatron_dattn.attention.backends.cuda_flash import CudaFlashBackend
from megatron_dattn.attention.parts import Part
from megatron_dattn.attention.rows import Rows
from tests.unit.attention.support import (
    RICH_LAYOUT,
    TEXT_ONLY_LAYOUT,
    make_problem,
    run_fast,
    run_oracle,
)


def _check_call(query: Tensor, key: Tensor, cu_q: Tensor, cu_k: Tensor, longest: list[int]) -> None:
    for cu, rows, most in zip((cu_q, cu_k), (query, key), longest, strict=True):
        assert cu.dtype == torch.int32
        assert cu[-1] == rows.shape[0]
        assert cu.diff().max() == most
    assert query.stride(-1) == key.stride(-1) == 1


def _segments(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    bounds = zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in bounds]


def _scores(
    query: Tensor, key: Tensor, causal: bool, scale: float, left: int | None, right: int | None
) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    ones, last = torch.ones(scores.shape[-2:], dtype=torch.bool), len(key) - len(query)
    if causal:
        assert right in (None, 0)
        scores = scores.masked_fill(ones.triu(1 + last), -torch.inf)
    if left is not None:
        scores = scores.masked_fill(ones.tril(last - left - 1), -torch.inf)
    return scores


def fake_forward(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    dropout: float, causal: bool, debug: bool, *, scale: float,
    window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    assert (dropout, debug) == (0.0, False)
    _check_call(query, key, cu_q, cu_k, [max_q, max_k])
    group = query.shape[1] // key.shape[1]
    out = torch.zeros_like(query)
    lse = query.new_full((query.shape[1], query.shape[0]), torch.inf)
    for q, k in _segments(cu_q, cu_k):
        window = window_size_left, window_size_right
        scores = _scores(query[q], key[k], causal, scale, *window)
        if scores.shape[-1]:
            values = value[k].repeat_interleave(group, dim=1)
            out[q] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
            lse[:, q] = scores.logsumexp(-1)
    return out, lse, None, None, None


def fake_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout: float, causal: bool,
    rng_state: Tensor, unused: Tensor, *, scale: float,
    window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert (dropout, rng_state.dtype) == (0.0, torch.uint64)
    assert lse.is_contiguous()
    assert lse.shape == (query.shape[1], query.shape[0])
    _check_call(query, key, cu_q, cu_k, [max_q, max_k])
    group = query.shape[1] // key.shape[1]
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for q, k in _segments(cu_q, cu_k):
        keys, values = (x[k].repeat_interleave(group, dim=1) for x in (key, value))
        window = window_size_left, window_size_right
        scores = _scores(query[q], key[k], causal, scale, *window)
        probabilities = (scores - lse[:, q, None]).exp()
        grad_p = torch.einsum("qhd,khd->hqk", grad_out[q], values)
        centre = (grad_out[q] * out[q]).sum(-1).T.unsqueeze(-1)
        grad_s = probabilities * (grad_p - centre) * scale
        grads[0][q] = torch.einsum("hqk,khd->qhd", grad_s, keys)
        grad_k = torch.einsum("hqk,qhd->khd", grad_s, query[q])
        grad_v = torch.einsum("hqk,qhd->khd", probabilities, grad_out[q])
        for target, grad in zip(grads[1:], (grad_k, grad_v), strict=True):
            target[k] = grad.unflatten(1, (-1, group)).sum(2)
    return grads


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> CudaFlashBackend:
    monkeypatch.setattr(cuda_flash, "_forward", fake_forward)
    monkeypatch.setattr(cuda_flash, "_backward", fake_backward)
    return CudaFlashBackend()


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("layout", [RICH_LAYOUT, TEXT_ONLY_LAYOUT], ids=["rich", "text-only"])
def test_equals_the_oracle(backend: CudaFlashBackend, layout: Any, preset: str, group: int) -> None:
    config = PRESETS[preset]
    problem = make_problem(layout, config, group=group)
    actual = run_fast(problem, layout, config, backend)
    for got, expected in zip(actual, run_oracle(problem, layout, config), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("preset", ["s_attn", "dattn"])
def test_the_window_is_the_kernels(backend: CudaFlashBackend, preset: str, window: int) -> None:
    config = PRESETS[preset]
    problem = make_problem(RICH_LAYOUT, config)
    actual = run_fast(problem, RICH_LAYOUT, config, backend, window=window)
    exact = run_oracle(problem, RICH_LAYOUT, config, window=window)
    for got, expected in zip(actual, exact, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_rows_without_keys_report_minus_infinity(backend: CudaFlashBackend) -> None:
    part = Part(
        "T2V", Rows(3), Rows(2), (2, 1), (0, 2), causal=False, rotary=False,
        device=torch.device("cpu"),
    )  # fmt: skip
    query, key, value = (torch.randn(n, 4, 8) for n in (3, 2, 2))
    out, lse = backend.forward(query, key, value, part, 1.0)
    assert torch.isneginf(lse[:2]).all()
    assert torch.isfinite(lse[2]).all()
    assert not out[:2].any()


def test_without_a_cuda_device_it_says_so() -> None:
    reason = CudaFlashBackend().unsupported(torch.device("cpu"), torch.bfloat16, 64)
    assert reason == "it needs a CUDA device, not cpu"


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "reason"),
    [
        ((9, 0), torch.bfloat16, 128, None),
        ((8, 0), torch.float16, 256, None),
        ((7, 5), torch.float16, 64, "older than compute capability 8.0"),
        ((9, 0), torch.float32, 64, "bfloat16 or float16, not torch.float32"),
        ((9, 0), torch.bfloat16, 264, "head_dim 264"),
        ((9, 0), torch.bfloat16, 36, "head_dim 36"),
    ],
)
def test_what_it_supports(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    reason: str | None,
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    actual = CudaFlashBackend().unsupported(torch.device("cuda"), dtype, head_dim)
    assert (actual is None) if reason is None else (actual is not None and reason in actual)
