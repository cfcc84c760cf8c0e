"""The local norms equal Hugging Face's and torch's; their weights know sequence parallelism."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from megatron_dattn.models.norm import LayerNorm, RMSNorm, ZeroCentredRMSNorm
from tests.support.megatron import tiny_transformer_config

pytestmark = pytest.mark.usefixtures("one_process")


def _rms_norms(dtype):
    ours = RMSNorm(tiny_transformer_config(params_dtype=dtype), 24, eps=1e-5)
    theirs = MistralRMSNorm(24, eps=1e-5).to(dtype)
    weight = torch.randn(24, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        ours.weight.copy_(weight)
        theirs.weight.copy_(weight)
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_hugging_face(dtype):
    ours, theirs = _rms_norms(dtype)
    tokens = torch.randn(7, 1, 24, generator=torch.Generator().manual_seed(1)).to(dtype) * 30
    inputs = [tokens.clone().requires_grad_() for _ in range(2)]
    outs = [norm(x) for norm, x in zip((ours, theirs), inputs, strict=True)]
    for out in outs:
        out.float().pow(2).sum().backward()
    assert outs[0].dtype == dtype
    # Same operations in the same precisions: only the order of a sum may differ in fp32, which
    # BF16's rounding hides in all but rare cases of one unit in the last place.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(outs[0], outs[1], rtol=tolerance, atol=0)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=2 * tolerance, atol=1e-6)
    # The input gradient is a difference of large terms, hence an absolute share of its maximum.
    atol = 4 * tolerance * inputs[1].grad.abs().max().item()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=atol)


@pytest.mark.parametrize("trained", [True, False])
def test_half_precision_is_that_of_autograd_bit_for_bit(trained: bool) -> None:
    ours, _ = _rms_norms(torch.bfloat16)
    ours.weight.requires_grad_(trained)
    generator = torch.Generator().manual_seed(1)
    tokens, grad = (torch.randn(37, 1, 24, generator=generator).bfloat16() for _ in range(2))
    tokens.requires_grad_()
    outs = ours(tokens), ours.weight * F.rms_norm(tokens, (24,), None, ours.eps)
    assert torch.equal(*outs)
    inputs = (tokens, ours.weight) if trained else (tokens,)
    found, expected = (torch.autograd.grad(out, inputs, grad) for out in outs)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_centred_rms_norm_equals_gemma2(dtype):
    config = tiny_transformer_config(params_dtype=dtype)
    ours, theirs = ZeroCentredRMSNorm(config, 24, eps=1e-6), Gemma2RMSNorm(24, eps=1e-6).to(dtype)
    assert not ours.weight.any()  # which is a factor of one
    with torch.no_grad():
        ours.weight.normal_()
        theirs.weight.copy_(ours.weight)
    tokens = torch.randn(7, 1, 24, generator=torch.Generator().manual_seed(1)).to(dtype) * 30
    outs = [norm(tokens) for norm in (ours, theirs)]
    assert outs[0].dtype == dtype
    # As above: the order of one sum in fp32.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(*outs, rtol=tolerance, atol=0)


def test_zero_centred_rms_norm_keeps_float64():
    config = tiny_transformer_config(params_dtype=torch.float64)
    norm, tokens = ZeroCentredRMSNorm(config, 24, eps=1e-5), torch.randn(5, 24, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    expected = tokens / (tokens.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + norm.weight)
    torch.testing.assert_close(norm(tokens), expected, rtol=1e-14, atol=0)


def test_rms_norm_keeps_float64():
    norm, tokens = _rms_norms(torch.float64)[0], torch.randn(5, 24, dtype=torch.float64)
    expected = tokens / (tokens.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(tokens), expected, rtol=1e-14, atol=0)


def test_zero_tokens_stay_zero():
    norm, tokens = _rms_norms(torch.float32)[0], torch.zeros(2, 24, requires_grad=True)
    norm(tokens).sum().backward()
    assert norm(tokens).abs().max() == 0
    assert tokens.grad.isfinite().all()


def test_layer_norm_equals_torch():
    ours = LayerNorm(tiny_transformer_config(normalization="LayerNorm"), 24, eps=1e-6)
    with torch.no_grad():
        ours.weight.normal_()
        ours.bias.normal_()
    tokens = torch.randn(5, 24)
    expected = torch.nn.functional.layer_norm(tokens, (24,), ours.weight, ours.bias, 1e-6)
    assert torch.equal(ours(tokens), expected)


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_are_marked_for_sequence_parallelism(sharded):
    config = tiny_transformer_config()
    config.sequence_parallel = sharded
    for norm in (RMSNorm(config, 8), LayerNorm(config, 8)):
        assert all(p.sequence_parallel is sharded for p in norm.parameters())
