"""What is left out changes nothing: float64 outputs and gradients with and without each saving.

The decoder alone, on this rank's rows, so that no loss in float32 stands between. Without savings
one process and two tensor-parallel ranks agree too.
"""

from functools import cache

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_dattn.attention import PRESETS
from megatron_dattn.models.config import ExactSavings
from megatron_dattn.models.vlm import DAttnVLM
from megatron_dattn.parallel.config import ParallelConfig
from tests.support.distributed import run_distributed
from tests.support.megatron import init_model_parallel
from tests.support.vlm import make_batch, tiny_model, tiny_model_config

NOTHING = ExactSavings(visual_queries=False, folded_output=False, unread_rows=False)
SAVINGS = {
    "nothing": NOTHING,
    "visual_queries": ExactSavings(folded_output=False, unread_rows=False),
    "folded_output": ExactSavings(visual_queries=False, unread_rows=False),
    "unread_rows": ExactSavings(visual_queries=False, folded_output=False),
    "ffn_chunk_rows": ExactSavings(False, False, False, ffn_chunk_rows=10),
    "everything": ExactSavings(ffn_chunk_rows=10),
}
Model = tuple[str, str, int]  # family, preset, layers


def _outputs_and_gradients(sizes: Model, savings: ExactSavings, ranks: int) -> dict[str, Tensor]:
    """Text rows after the last layer, and what a random gradient of theirs gives."""
    family, preset, layers = sizes
    model = tiny_model(
        tiny_model_config(preset, family=family, num_hidden_layers=layers),
        parallel=ParallelConfig(tensor_model_parallel_size=ranks, sequence_parallel=ranks > 1),
        savings=savings,
    ).double()
    batch = make_batch([9, 5, 8], [(3,), (), (0, 5)], seed=1)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(batch.layout.num_rows, 1, 40, generator=generator, dtype=torch.float64)
    gradient = torch.randn(batch.layout.text_budget, 1, 40, generator=generator).double()
    shards = model._shards(batch.layout)
    local = shards.scatter(rows).requires_grad_()
    attention = model.attention_inputs(batch.layout, rows.device)
    out = model.language_model(local, attention)
    text = out[-shards.local_text :]
    first = gradient.shape[0] // ranks * model.pg_collection.tp.rank() if ranks > 1 else 0
    text.backward(gradient[first : first + shards.local_text])
    _finish_replicated_gradients(model, ranks)
    found = {"out": text.detach(), "input": local.grad}
    for name, parameter in model.language_model.decoder.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
    return found


def _finish_replicated_gradients(model: DAttnVLM, ranks: int) -> None:
    """What megatron-core's `finalize_model_grads` does for norms under sequence parallelism."""
    for parameter in model.parameters():
        is_partial = ranks > 1 and getattr(parameter, "sequence_parallel", False)
        if is_partial and parameter.grad is not None:
            torch.distributed.all_reduce(
                parameter.grad, group=parallel_state.get_tensor_model_parallel_group()
            )


Found = dict[tuple[Model, str], dict[str, Tensor]]


def _all(ranks: int, models: tuple[Model, ...]) -> Found:
    init_model_parallel(ranks)
    return {
        (model, name): _outputs_and_gradients(model, savings, ranks)
        for model in models
        for name, savings in SAVINGS.items()
    }


@cache
def _results(ranks: int) -> list[Found]:
    return run_distributed(_all, ranks, ranks, MODELS)


GEMMA2_PRESETS = ("dattn", "s_attn", "dattn_tanh", "saisa", "shortv", "exit", "yopo")
MODELS: tuple[Model, ...] = (
    *(("mistral", name, 3) for name in PRESETS if name not in ("fastervlm", "vidi")),
    *(("gemma2", name, 3) for name in GEMMA2_PRESETS),
    # The last layer that sees images is one with a window.
    *(("gemma2", name, 2) for name in ("exit", "yopo")),
)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: "-".join(map(str, model)))
def test_a_saving_changes_nothing(model: Model, ranks: int) -> None:
    for by_case in _results(ranks):
        expected = by_case[model, "nothing"]
        for name in SAVINGS:
            actual = by_case[model, name]
            # A parameter that only unread rows reach has a gradient of zero, or none.
            assert actual.keys() <= expected.keys()
            for key, value in expected.items():
                got = actual.get(key, torch.zeros_like(value))
                # Some hundred float64 roundings, relative to the tensor's largest entry.
                atol = 1e-12 * max(1.0, value.abs().max().item())
                torch.testing.assert_close(got, value, rtol=0, atol=atol, msg=f"{name}: {key}")
