"""The CPU backends against plain softmax attention, segment by segment."""

import pytest
import torch
from torch import Tensor

from megatron_dattn.attention.backends.base import Backend, ScoreFunction
from megatron_dattn.attention.backends.cpu_flash import CpuFlashBackend
from megatron_dattn.attention.backends.math import MathBackend
from megatron_dattn.attention.plan.index import TokenIndex
from megatron_dattn.attention.plan.parts import Part, cu_seqlens

SCALE = 0.3
SCORES = ScoreFunction(SCALE)
KEY_HEADS, GROUP, DIM = 2, 3, 8

# (query lengths, key lengths, causal): ragged, equal, without tokens of one kind, and too different
# for one padded batch.
SHAPES = {
    "ragged causal": ((3, 1, 5), (3, 1, 5), True),
    "equal causal": ((4, 4), (4, 4), True),
    "ragged keys": ((3, 1, 5), (2, 7, 4), False),
    "equal keys": ((3, 1, 5), (4, 4, 4), False),
    "several batches": ((2, 300, 3), (4, 300, 1), False),
    "no keys in one": ((2, 3, 1), (0, 2, 0), False),
    "no queries in one": ((2, 0, 1), (3, 4, 2), False),
    "no keys at all": ((2, 1), (0, 0), False),
    "nothing causal": ((2, 0, 3), (2, 0, 3), True),
    "several causal batches": ((2, 400, 3), (2, 400, 3), True),
    "wide": ((130, 190), (200, 150), False),
    "wide causal": ((130, 190), (130, 190), True),
}

every_shape = pytest.mark.parametrize("shape", SHAPES)
every_backend = pytest.mark.parametrize("backend", [MathBackend(), CpuFlashBackend()])


def make_part(shape: str) -> Part:
    query_lengths, key_lengths, causal = SHAPES[shape]
    return Part(
        name=shape,
        query_tokens=TokenIndex(sum(query_lengths)),
        key_tokens=TokenIndex(sum(key_lengths)),
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        causal=causal,
        rotary=False,
        query_cu_seqlens=cu_seqlens(query_lengths),
        key_cu_seqlens=cu_seqlens(key_lengths),
    )


def make_inputs(part: Part, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(part.query_tokens.length, KEY_HEADS * GROUP, DIM)]
    shapes += [(part.key_tokens.length, KEY_HEADS, DIM)] * 2
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in shapes
    ]


def plain_attention(inputs: list[Tensor], part: Part) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, one segment after the other."""
    query, key, value = inputs
    key, value = (x.repeat_interleave(GROUP, dim=1) for x in (key, value))
    outs, lses = [], []
    segments = zip(
        query.split(part.query_lengths),
        key.split(part.key_lengths),
        value.split(part.key_lengths),
        strict=True,
    )
    for q, k, v in segments:
        scores = torch.einsum("qhd,khd->qhk", q, k) * SCALE
        if part.causal:
            future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1).unsqueeze(1)
            scores = scores.masked_fill(future, -torch.inf)
        outs.append(torch.einsum("qhk,khd->qhd", scores.softmax(-1), v))
        nothing = torch.full(scores.shape[:2], -torch.inf, dtype=scores.dtype)
        lses.append(scores.logsumexp(-1) if len(k) else nothing)
    return torch.cat(outs), torch.cat(lses)


@every_shape
@every_backend
def test_output_and_log_sum_exp(backend: Backend, shape: str) -> None:
    part = make_part(shape)
    inputs = make_inputs(part)
    for actual, expected in zip(
        backend.forward(*inputs, part, SCORES), plain_attention(inputs, part), strict=True
    ):
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


@every_shape
@every_backend
def test_gradients(backend: Backend, shape: str) -> None:
    part = make_part(shape)
    inputs = make_inputs(part)
    out, lse = plain_attention(inputs, part)
    grad_out = torch.randn_like(out)
    expected = torch.autograd.grad(out, inputs, grad_out)
    detached = [x.detach() for x in (*inputs, out, lse)]
    actual = backend.backward(grad_out, *detached, part, SCORES)
    for got, exact in zip(actual, expected, strict=True):
        # Sums over up to 400 keys.
        torch.testing.assert_close(got, exact, atol=1e-11, rtol=0)


@every_backend
def test_two_parts_share_the_gradient_of_their_joint_softmax(backend: Backend) -> None:
    """Given the joint (out, lse), each part's backward is its columns of the joint gradient."""
    whole = make_part("ragged keys")
    query, key, value = make_inputs(whole)
    out, lse = plain_attention([query, key, value], whole)
    grad_out = torch.randn_like(out)
    expected = torch.autograd.grad(out, (query, key, value), grad_out)

    halves: list[tuple[Part, Tensor]] = []
    starts, lengths = [0, 2, 9], whole.key_lengths
    for first in (True, False):
        tokens, sizes = [], []
        for start, length in zip(starts, lengths, strict=True):
            middle = length // 2
            chosen = (
                range(start, start + middle) if first else range(start + middle, start + length)
            )
            tokens += list(chosen)
            sizes.append(len(chosen))
        part = make_part("ragged keys")
        part = Part(
            "half",
            part.query_tokens,
            TokenIndex(len(tokens)),
            part.query_lengths,
            tuple(sizes),
            causal=False,
            rotary=False,
            query_cu_seqlens=part.query_cu_seqlens,
            key_cu_seqlens=cu_seqlens(sizes),
        )
        halves.append((part, torch.tensor(tokens)))

    grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
    for part, index in halves:
        inputs = [x.detach() for x in (query, key[index], value[index], out, lse)]
        dq, dk, dv = backend.backward(grad_out, *inputs, part, SCORES)
        grad_query += dq
        grad_key[index] = dk
        grad_value[index] = dv
    for got, exact in zip((grad_query, grad_key, grad_value), expected, strict=True):
        torch.testing.assert_close(got, exact, atol=1e-12, rtol=0)


@every_backend
def test_half_precision_is_computed_in_float32(backend: Backend) -> None:
    part = make_part("ragged keys")
    inputs = make_inputs(part, torch.bfloat16)
    out, lse = backend.forward(*inputs, part, SCORES)
    expected_out, expected_lse = plain_attention([x.double() for x in inputs], part)
    assert out.dtype == lse.dtype == torch.float32
    # Float32 arithmetic on BF16 inputs, without one BF16 rounding (4e-3) on the way.
    torch.testing.assert_close(out.double(), expected_out, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=0)


@pytest.mark.parametrize("threads", [1, 99])
@pytest.mark.parametrize("shape", ["wide", "wide causal"])
def test_wide_segments_are_computed_in_bfloat16(
    shape: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few threads fold the heads of a group for the gradients of segments without a mask."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    part = make_part(shape)
    inputs = make_inputs(part, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, lse = plain_attention(exact, part)
    grad_out = torch.randn_like(out).bfloat16()
    expected = torch.autograd.grad(out, exact, grad_out.double())
    detached = [x.detach() for x in inputs]
    given = out.detach().bfloat16(), lse.detach().float()
    gradients = CpuFlashBackend().backward(grad_out, *detached, *given, part, SCORES)
    for actual, wanted in zip(gradients, expected, strict=True):
        # Probabilities and gradients of the scores are rounded to BF16 (4e-3) before their sums.
        error = (actual.double() - wanted).norm() / wanted.norm()
        assert error < 1e-2, error


@every_backend
def test_padding_stays_finite_whatever_the_scores(backend: Backend) -> None:
    """Scores of thousands: exp() of anything that is not a true probability would overflow."""
    part = make_part("ragged causal")
    query, key, value = (x.detach().float() for x in make_inputs(part))
    query = query * 5000
    out, lse = backend.forward(query, key, value, part, SCORES)
    gradients = backend.backward(torch.ones_like(out), query, key, value, out, lse, part, SCORES)
    for tensor in (out, lse, *gradients):
        assert torch.isfinite(tensor).all()
