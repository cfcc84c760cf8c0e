"""Whether a timed layer computes the right thing: its outputs and gradients against a reference.

The reference is the same layer with the same weights in float64 with the backend `math`, whose
score matrix limits it to short inputs. Above that, variants of one preset are compared with each
other in the run's own precision.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.decoder_layer import LayerBench, Variant
from megatron_dattn.attention import TokenLayout

LONGEST_CHECKED = 2304
"""Visual rows up to which the float64 reference is run: 8 heads' scores then take 0.4 GB."""


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
        assert layer.rows.grad is not None
        rows = {"output": out, "input gradient": layer.rows.grad}
        weights = {
            local_name(name): parameter.grad.double()
            for name, parameter in layer.model.named_parameters()
            if parameter.grad is not None
        }
        return Outcome({name: x.double().squeeze(1) for name, x in rows.items()}, weights)


@dataclass(frozen=True)
class Agreement:
    """Relative errors (Frobenius norms): the worse one of text and visual rows, of all weights."""

    against: str
    output: float
    input_gradient: float
    weight_gradient: float


def agree(layer: LayerBench) -> Agreement:
    """Compare the layer with the best reference there is for so many rows."""
    variant, bench, layout = layer.variant, layer.bench, layer.layout
    if layout.num_visual_rows <= LONGEST_CHECKED:
        exact = LayerBench(bench, Variant.parse(variant.preset), layout, double=True)
        copy_weights(layer.model, exact.model)
        return compare(Outcome.of(layer), Outcome.of(exact), layout, "float64")
    if variant.name == variant.preset:
        return Agreement("not checked", *(float("nan"),) * 3)
    other = LayerBench(bench, Variant.parse(variant.preset), layout)
    copy_weights(layer.model, other.model)
    return compare(Outcome.of(layer), Outcome.of(other), layout, variant.preset)


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
    """|ours - theirs| / |theirs|; 0 where both are nothing."""
    difference = (ours - theirs).norm().item()
    return difference / theirs.norm().item() if difference else 0.0


@torch.no_grad()
def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Give the target the source's weights, whichever implementation each one has."""
    values = {local_name(name): parameter for name, parameter in source.named_parameters()}
    for name, parameter in target.named_parameters():
        parameter.copy_(values[local_name(name)])


def local_name(name: str) -> str:
    """A parameter's name without Transformer Engine, whose linear layers own the norm before."""
    layer, found, kind = name.partition("self_attention.")
    if found and ".layer_norm_" in kind:
        return f"{layer}input_layernorm.{kind.split('.layer_norm_')[1]}"
    return name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
