"""What is left out changes nothing: float64 outputs and gradients with and without each saving.

The decoder's savings are judged on the decoder alone, on this rank's tokens, so that no loss in
float32 stands between; the head's on the whole model. One process and two tensor-parallel ranks
are compared with each other too.
"""

import dataclasses
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_dattn.attention import PRESETS
from megatron_dattn.batch import PackedBatch
from megatron_dattn.models.execution import ExactSavings
from megatron_dattn.models.vlm import DAttnVLM
from megatron_dattn.parallel.config import ParallelConfig
from tests.support.distributed import run_distributed
from tests.support.megatron import init_model_parallel
from tests.support.vlm import (
    join_shards,
    make_batch,
    partition_of,
    tiny_model,
    tiny_model_config,
)

NOTHING = ExactSavings(
    visual_queries=False, folded_output=False, unread_tokens=False, labelled_logits=False
)
SAVINGS = {
    "nothing": NOTHING,
    "visual_queries": ExactSavings(folded_output=False, unread_tokens=False),
    "folded_output": ExactSavings(visual_queries=False, unread_tokens=False),
    "unread_tokens": ExactSavings(visual_queries=False, folded_output=False),
    "ffn_chunk_tokens": ExactSavings(False, False, False, ffn_chunk_tokens=10),
    "everything": ExactSavings(ffn_chunk_tokens=10),
}
# Of these the whole model runs, the others concern the decoder.
HEADS = {
    "nothing": ExactSavings(labelled_logits=False),
    "labelled_logits": ExactSavings(),
}
Model = tuple[str, str, int]  # family, preset, layers
GEMMA2_PRESETS = ("dattn", "s_attn", "dattn_tanh", "saisa", "shortv", "exit", "yopo")
MODELS: tuple[Model, ...] = (
    *(("mistral", name, 3) for name in PRESETS),
    *(("gemma2", name, 3) for name in GEMMA2_PRESETS),
    # The last layer that sees images is one with a window.
    *(("gemma2", name, 2) for name in ("exit", "yopo")),
    *((family, name, 3) for family in ("qwen2", "qwen3") for name in ("dattn", "saisa", "yopo")),
)


class Shard(NamedTuple):
    """What one rank has of a tensor: the whole of it, or its share along an axis."""

    values: Tensor
    axis: int | None
    stride: int = 1


Found = dict[str, Shard]
Results = dict[tuple[Model, str], Found]  # by model and saving


def _model(sizes: Model, savings: ExactSavings, ranks: int) -> DAttnVLM:
    family, preset, layers = sizes
    return tiny_model(
        tiny_model_config(preset, family=family, num_hidden_layers=layers),
        parallel=ParallelConfig(tensor_model_parallel_size=ranks, sequence_parallel=ranks > 1),
        savings=savings,
    ).double()


def _batch(model: DAttnVLM, *, unlabelled: bool = False) -> PackedBatch:
    grid = model.model_config.image_grid
    return make_batch([9, 5, 8], [(3,), (), (0, 5)], seed=1, unlabelled=unlabelled, grid=grid)


def _decoder(sizes: Model, savings: ExactSavings, ranks: int) -> Found:
    """Text tokens after the last layer, and what a random gradient of theirs gives."""
    model = _model(sizes, savings, ranks)
    batch = _batch(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch.layout.num_tokens, 1, 40, generator=generator, dtype=torch.float64)
    gradient = torch.randn(batch.layout.text_budget, 1, 40, generator=generator).double()
    shards = model._shards(batch.layout)
    local = shards.scatter(tokens).requires_grad_()
    attention = model.attention_inputs(batch.layout, tokens.device)
    out = model.language_model(local, attention)
    text = out[-shards.local_text :]
    first = gradient.shape[0] // ranks * model.pg_collection.tp.rank() if ranks > 1 else 0
    text.backward(gradient[first : first + shards.local_text])
    assert local.grad is not None
    visual_input, text_input = shards.split(local.grad)
    cut = 0 if ranks > 1 else None  # sequence parallelism cuts the tokens
    found = {
        "out": Shard(text.detach(), cut),
        "visual input": Shard(visual_input, cut),
        "text input": Shard(text_input, cut),
    }
    return found | _gradients(model, model.language_model.decoder, ranks)


def _whole_model(sizes: Model, savings: ExactSavings, ranks: int) -> Found:
    """Losses of the labelled tokens, and what random weights of theirs give to all parameters.

    A pack without a label goes the same way: its losses are none, and their gradient is zero.
    """
    model = _model(sizes, savings, ranks)
    losses, none = (
        model(dataclasses.replace(batch, pixel_values=batch.pixel_values.double()))
        for batch in (_batch(model), _batch(model, unlabelled=True))
    )
    assert none.shape == (0,)
    weights = torch.randn(len(losses), generator=torch.Generator().manual_seed(0))
    ((losses * weights).sum() + none.sum()).backward()
    return {"losses": Shard(losses.detach(), None)} | _gradients(model, model, ranks)


def _gradients(model: DAttnVLM, of: torch.nn.Module, ranks: int) -> Found:
    _finish_replicated_gradients(model, ranks)
    return {
        name: Shard(parameter.grad, *partition_of(parameter))
        for name, parameter in of.named_parameters()
        if parameter.grad is not None
    }


def _finish_replicated_gradients(model: DAttnVLM, ranks: int) -> None:
    """What megatron-core's `finalize_model_grads` does for norms under sequence parallelism."""
    for parameter in model.parameters():
        is_partial = ranks > 1 and getattr(parameter, "sequence_parallel", False)
        if is_partial and parameter.grad is not None:
            torch.distributed.all_reduce(
                parameter.grad, group=parallel_state.get_tensor_model_parallel_group()
            )


def _all(ranks: int) -> tuple[Results, Results]:
    init_model_parallel(ranks)
    of_decoder = {
        (model, name): _decoder(model, savings, ranks)
        for model in MODELS
        for name, savings in SAVINGS.items()
    }
    of_model = {
        (model, name): _whole_model(model, savings, ranks)
        for model in MODELS
        for name, savings in HEADS.items()
    }
    return of_decoder, of_model


@cache
def _results(ranks: int) -> list[tuple[Results, Results]]:
    return run_distributed(_all, ranks, ranks, timeout=300)


def _assert_equal(actual: Found, expected: Found, name: str) -> None:
    # A parameter that only unread tokens reach has a gradient of zero, or none.
    assert actual.keys() <= expected.keys()
    for key, (value, *_) in expected.items():
        got = actual[key].values if key in actual else torch.zeros_like(value)
        # Some hundred float64 roundings, relative to the tensor's largest entry.
        atol = 1e-12 * max(1.0, value.abs().max().item())
        torch.testing.assert_close(got, value, rtol=0, atol=atol, msg=f"{name}: {key}")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: "-".join(map(str, model)))
def test_a_saving_changes_nothing(model: Model, ranks: int) -> None:
    for by_case, _ in _results(ranks):
        for name in SAVINGS:
            _assert_equal(by_case[model, name], by_case[model, "nothing"], name)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: "-".join(map(str, model)))
def test_logits_without_a_label_change_nothing(model: Model, ranks: int) -> None:
    """Against a head and a loss on all text tokens.

    With two ranks megatron-core takes the loss in float32, of the same logits here and there.
    """
    for _, by_case in _results(ranks):
        expected = by_case[model, "nothing"]
        assert len(expected["losses"].values) > 5
        for name in HEADS:
            assert by_case[model, name].keys() == expected.keys()
            _assert_equal(by_case[model, name], expected, name)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: "-".join(map(str, model)))
def test_one_process_and_two_ranks_agree(model: Model) -> None:
    ((alone, _),) = _results(1)
    for name in SAVINGS:
        ranks = [by_case[model, name] for by_case, _ in _results(2)]
        _assert_equal(_joined(ranks), alone[model, name], name)


def _joined(ranks: Iterable[Found]) -> Found:
    first, *others = ranks
    joined = {}
    for key, (values, axis, stride) in first.items():
        shards = [values, *(found[key].values for found in others)]
        joined[key] = Shard(join_shards(shards, axis, stride), None)
    return joined
