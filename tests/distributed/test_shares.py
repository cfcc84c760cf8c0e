"""YOPO's shares in the model, against their definitions: the first neurons, the first key heads.

In float64, in one process and cut over two ranks, of which one may hold none of a share.
"""

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.reference import reference_attention
from megatron_dattn.models.vlm import DAttnVLM
from megatron_dattn.parallel.config import ParallelConfig
from tests.support.distributed import run_distributed
from tests.support.megatron import init_model_parallel
from tests.support.vlm import LANGUAGE, join_tokens, make_batch, tiny_model, tiny_model_config

# Of 56 neurons; two ranks hold 28 each.
SHARES = {0.25: 14, 0.5: 28, 0.8: 45}
HEADS_WITH_IMAGES = (1, 1, 1, 0)
TOKENS = 8

Compared = dict[str, tuple[Tensor, Tensor]]


def _model(ranks: int) -> DAttnVLM:
    init_model_parallel(ranks)
    parallel = ParallelConfig(tensor_model_parallel_size=ranks, sequence_parallel=ranks > 1)
    # Images leave after two of four layers: in the first one they attend and are read again.
    config = tiny_model_config("yopo", num_hidden_layers=4)
    return tiny_model(config, parallel=parallel).double()


def _partial_ffns(ranks: int) -> dict[float, Compared]:
    """By share: this rank's tokens and gradients, of the share and of an FFN with zeroed
    neurons."""
    model = _model(ranks)
    layer = model.language_model.decoder.layers[0]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, TOKENS, 1, LANGUAGE.hidden_size, generator=generator).double()
    rank = parallel_state.get_tensor_model_parallel_rank()
    tokens, gradient = drawn.chunk(ranks, dim=1)[rank]
    here = LANGUAGE.intermediate_size // ranks
    found = {}
    for share, used in SHARES.items():
        kept = max(0, min(used - rank * here, here))
        mine = _pass(layer, lambda tokens, s=share: layer.visual_ffn(tokens, s), tokens, gradient)
        whole = layer.mlp.linear_fc2.weight.data.clone()
        layer.mlp.linear_fc2.weight.data[:, kept:] = 0.0
        zeroed = _pass(layer, layer.ffn, tokens, gradient)
        # What was set to zero has a gradient still, which the share has not.
        zeroed["second weight"][:, kept:] = 0.0
        layer.mlp.linear_fc2.weight.data.copy_(whole)
        found[share] = {name: (mine[name], zeroed[name]) for name in mine}
    return found


def _pass(layer: Any, function: Any, tokens: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a function of the layer's FFN."""
    layer.zero_grad()
    tokens = tokens.clone().requires_grad_()
    out = function(tokens)
    out.backward(gradient)
    return {
        "out": out.detach(),
        "input": tokens.grad,
        "norm": layer.pre_mlp_layernorm.weight.grad.clone(),
        "first weight": layer.mlp.linear_fc1.weight.grad.clone(),
        "second weight": layer.mlp.linear_fc2.weight.grad.clone(),
    }


def _first_layers_attention(ranks: int) -> Compared:
    """What the first layer's attention gave this rank's heads, and what the oracle says."""
    model = _model(ranks)
    seen: list[tuple[Any, Tensor]] = []
    core = model.language_model.decoder.layers[0].self_attention.core_attention
    core.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    batch = make_batch([9, 5, 8], [(3,), (), (0, 5)], seed=1)
    tokens = join_tokens(model, _double(batch))
    model.language_model(tokens, model.attention_inputs(batch.layout, tokens.device))
    ((query, key, value, _, _, inputs), out), *_ = seen
    rank, here = parallel_state.get_tensor_model_parallel_rank(), len(HEADS_WITH_IMAGES) // ranks
    mask = torch.tensor(HEADS_WITH_IMAGES[rank * here : (rank + 1) * here]).double()
    expected = {
        name: reference_attention(
            query,
            key,
            value,
            batch.layout,
            PRESETS["yopo"],
            inputs.rotary,
            score_function=inputs.score_function,
            head_mask=head_mask,
        ).flatten(1)
        for name, head_mask in (("masked", mask), ("unmasked", torch.ones_like(mask)))
    }
    return {name: (out.detach(), oracle.detach()) for name, oracle in expected.items()}


def _double(batch: Any) -> Any:
    batch.pixel_values = batch.pixel_values.double()
    return batch


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_share_of_the_ffn_is_its_first_neurons(ranks: int) -> None:
    for by_share in run_distributed(_partial_ffns, ranks, ranks):
        for share, compared in by_share.items():
            for name, (actual, expected) in compared.items():
                message = f"{share}: {name}"
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12, msg=message)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_share_of_the_heads_is_the_first_key_heads(ranks: int) -> None:
    for rank, compared in enumerate(run_distributed(_first_layers_attention, ranks, ranks)):
        torch.testing.assert_close(*compared["masked"], rtol=0, atol=1e-12)
        out, unmasked = compared["unmasked"]
        # The last rank has the masked head; another one would not notice if there were no mask.
        assert torch.allclose(out, unmasked, atol=1e-6) == (rank + 1 < ranks)
