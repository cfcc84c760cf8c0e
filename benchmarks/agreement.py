"""Whether a timed layer computes the right thing: its outputs and gradients against a reference.

The reference is the same layer with the same weights in float64, without savings, over attention
written as it is defined (`exact_attention.py`), whatever the length.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.decoder_layer import LayerBench, Variant
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.runtime.engine_imports import TE_NORMS


@dataclass(frozen=True)
class Outcome:
    """What one forward and backward pass gives, in float64."""

    rows: dict[str, Tensor]
    """Output and input gradient, [S, H] each."""
    weights: dict[str, Tensor]
    """Gradients of the parameters, under the names of the local implementation."""

    @staticmethod
    def of(layer: LayerBench) -> "Outcome":
        """Run one step of the layer."""
        out = layer.step()
        assert layer.tokens.grad is not None
        rows = {"output": out, "input gradient": layer.tokens.grad}
        weights = {
            local_name(name): parameter.grad.double()
            for name, parameter in layer.model.named_parameters()
            if parameter.grad is not None
        }
        return Outcome({name: x.double().squeeze(1) for name, x in rows.items()}, weights)


@dataclass(frozen=True)
class Agreement:
    """Relative errors (Frobenius norms): the worse one of text and visual tokens; of weights."""

    against: str
    output: float
    input_gradient: float
    weight_gradient: float


def agree(layers: Mapping[str, LayerBench]) -> dict[str, Agreement]:
    """Compare every layer with the float64 run of its preset; of one layout and one `Bench`.

    Layers of one preset begin with equal weights and inputs, so they share the run.
    """
    found: dict[str, Agreement] = {}
    for preset in dict.fromkeys(layer.variant.preset for layer in layers.values()):
        variants = {n: layer for n, layer in layers.items() if layer.variant.preset == preset}
        first = next(iter(variants.values()))
        exact = LayerBench(first.bench, Variant.parse(f"{preset}:naive"), first.layout, double=True)
        copy_weights(first.model, exact.model)
        expected = Outcome.of(exact)
        exact.drop_gradients()
        for name, layer in variants.items():
            assert have_equal_weights(layer.model, first.model), "variants of a preset do"
            found[name] = compare(Outcome.of(layer), expected, layer.layout, "float64")
            layer.drop_gradients()
    return found


def compare(ours: Outcome, theirs: Outcome, layout: TokenLayout, against: str) -> Agreement:
    """Errors of `ours`, measured by the size of `theirs`."""
    kinds = (slice(0, layout.visual_budget), slice(layout.visual_budget, None))
    worst = {
        name: max(relative_error(ours.rows[name][kind], theirs.rows[name][kind]) for kind in kinds)
        for name in theirs.rows
    }
    assert ours.weights.keys() == theirs.weights.keys(), "the same parameters have gradients"
    weights = [
        torch.cat([outcome.weights[name].flatten() for name in theirs.weights])
        for outcome in (ours, theirs)
    ]
    return Agreement(
        against, worst["output"], worst["input gradient"], relative_error(weights[0], weights[1])
    )


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs| of two of any shape and dtype; 0 where both are nothing."""
    difference = (ours - theirs).norm().item()
    return difference / theirs.norm().item() if difference else 0.0


@torch.no_grad()
def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Give the target the source's weights, whichever implementation each one has."""
    values = {local_name(name): parameter for name, parameter in source.named_parameters()}
    for name, parameter in target.named_parameters():
        parameter.copy_(values[local_name(name)])


def have_equal_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    """True if they are the same, bit by bit."""
    values = {local_name(name): parameter for name, parameter in theirs.named_parameters()}
    return all(torch.equal(p, values[local_name(name)]) for name, p in ours.named_parameters())


def local_name(name: str) -> str:
    """A parameter's name without Transformer Engine, whose linear layers own the norm before."""
    for fused, apart in TE_NORMS.items():
        name = name.replace(fused, apart)
    return name
