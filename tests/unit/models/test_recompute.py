"""Tensors whose memory is free between forward and backward pass, and whose gradients are the same.

What the decoder does with it is held by the tests of the whole model.
"""

import gc
import weakref

import pytest
import torch

from megatron_dattn.models.recompute import recompute_in_backward


def _steps(recompute: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input, what lies in between, output: the second product keeps what lies in between."""
    torch.manual_seed(0)
    inputs = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(4, 3, requires_grad=True)
    middle = inputs.tanh() * 1.0
    out = middle.unsqueeze(1).squeeze(1) @ weight  # of a view, as megatron-core's layers have it
    if recompute:
        recompute_in_backward(middle, lambda: inputs.tanh() * 1.0, out)
    return inputs, middle, out


def test_memory_is_free_until_the_gradient_arrives() -> None:
    inputs, middle, out = _steps(recompute=True)
    assert middle.untyped_storage().nbytes() == 0
    loss = out.square().sum()
    loss.backward()
    assert torch.equal(middle, inputs.tanh() * 1.0)
    kept, _, expected = _steps(recompute=False)
    expected.square().sum().backward()
    assert torch.equal(inputs.grad, kept.grad)


def test_a_graph_that_outlives_its_backward_pass_holds_nothing() -> None:
    inputs, middle, out = _steps(recompute=True)
    loss = out.square().sum()
    loss.backward()
    gone = weakref.ref(middle)
    del middle, out, inputs
    gc.collect()
    assert gone() is None


def test_a_retained_graph_goes_backward_again() -> None:
    inputs, _, out = _steps(recompute=True)
    loss = out.square().sum()
    loss.backward(retain_graph=True)
    first = inputs.grad.clone()
    loss.backward()
    assert torch.equal(inputs.grad, 2 * first)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_graph_nothing_happens(mode: type) -> None:
    with mode():
        _, middle, _ = _steps(recompute=True)
    assert middle.untyped_storage().nbytes() == 6 * 4 * 4
