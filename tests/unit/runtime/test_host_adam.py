"""HostAdam against torch's own optimizers."""

import copy
from collections.abc import Callable

import pytest
import torch

from megatron_dattn.runtime.host_adam import HostAdam

SHAPES = [(3, 5), (7,), (), (64, 33)]
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def make_parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES
    ]


def run(
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    steps: int,
    first: int = 0,
) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("decoupled", "oracle"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)]
)
def test_equals_torchs_fused_optimizer_bitwise(
    dtype: torch.dtype, decoupled: bool, oracle: Callable[..., torch.optim.Optimizer]
) -> None:
    ours, theirs = make_parameters(dtype), make_parameters(dtype)
    run(HostAdam(ours, adam_w_mode=decoupled, **SETTINGS), ours, 5)
    run(oracle(theirs, fused=True, **SETTINGS), theirs, 5)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("decoupled", [True, False])
def test_equals_torchs_plain_loop(decoupled: bool) -> None:
    ours, theirs = make_parameters(torch.float64), make_parameters(torch.float64)
    oracle = torch.optim.AdamW if decoupled else torch.optim.Adam
    run(HostAdam(ours, adam_w_mode=decoupled, **SETTINGS), ours, 20)
    run(oracle(theirs, foreach=False, **SETTINGS), theirs, 20)
    for a, b in zip(ours, theirs, strict=True):
        # Twenty updates of size 1e-2, each rounded to 53 bits in another order.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_step_lives_in_the_group() -> None:
    parameters = make_parameters(torch.float32)
    optimizer = HostAdam([{"params": parameters[:2]}, {"params": parameters[2:]}], **SETTINGS)
    assert all("step" not in group for group in optimizer.param_groups)
    run(optimizer, parameters, 3)
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    for state in optimizer.state.values():
        assert set(state) == {"exp_avg", "exp_avg_sq"}


def test_goes_on_from_a_state_dict_bitwise() -> None:
    parameters = make_parameters(torch.float32)
    optimizer = HostAdam(parameters, **SETTINGS)
    run(optimizer, parameters, 3)
    resumed = copy.deepcopy(parameters)
    other = HostAdam(resumed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, parameters, 2, first=3)
    run(other, resumed, 2, first=3)
    for a, b in zip(parameters, resumed, strict=True):
        assert torch.equal(a, b)


def test_mixed_types_missing_gradients_and_empty_shards() -> None:
    single = torch.nn.Parameter(torch.ones(4))
    half = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    idle = torch.nn.Parameter(torch.ones(4))
    empty = torch.nn.Parameter(torch.empty(0))
    optimizer = HostAdam([single, half, idle, empty], lr=0.5)
    for parameter in (single, half, empty):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # The first update of Adam is lr * sign(gradient), to within eps.
    torch.testing.assert_close(single.data, torch.full((4,), 0.5))
    torch.testing.assert_close(half.data, torch.full((4,), 0.5, dtype=torch.bfloat16))
    assert torch.equal(idle.data, torch.ones(4))
    assert set(optimizer.state) == {single, half}


def test_refuses_a_closure() -> None:
    with pytest.raises(ValueError, match="closure"):
        HostAdam([torch.nn.Parameter(torch.ones(1))]).step(lambda: 0.0)
