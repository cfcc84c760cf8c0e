"""The gated activation keeps its input alone and gives what autograd gives, bit for bit."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP

from megatron_dattn.models.projections import gated_activation


def _mlp(function) -> MLP:
    config = SimpleNamespace(bias_activation_fusion=False)
    return cast(MLP, SimpleNamespace(config=config, activation_func=function))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("function", [F.silu, F.gelu])
def test_values_and_gradients_are_those_of_autograd(function, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(37, 1, 84, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(37, 1, 42, generator=generator).to(dtype)
    out = gated_activation(_mlp(function), tokens)
    gate, up = tokens.chunk(2, dim=-1)
    expected = function(gate) * up
    assert torch.equal(out, expected)
    found, wanted = (torch.autograd.grad(x, tokens, grad)[0] for x in (out, expected))
    assert torch.equal(found, wanted)


def test_only_the_input_is_kept() -> None:
    tokens = torch.randn(5, 1, 8, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gated_activation(_mlp(F.silu), tokens)
    assert [x.data_ptr() for x in kept] == [tokens.data_ptr()]
