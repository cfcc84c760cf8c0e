"""Plans per layer: which layers share one; windows and caps reach the attention."""

import pytest
import torch

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.backends.base import ScoreFunction
from megatron_dattn.attention.layers import layer_rules
from megatron_dattn.attention.reference import reference_attention
from megatron_dattn.models.attention_inputs import AttentionInputs
from megatron_dattn.models.vlm import DAttnVLM
from tests.support.vlm import make_batch, tiny_model, tiny_model_config

pytestmark = pytest.mark.usefixtures("one_process")

LAYERS = 4


def _prepared(preset: str, **language: object) -> tuple[DAttnVLM, AttentionInputs]:
    config = tiny_model_config(preset, num_hidden_layers=LAYERS, **language)
    model = tiny_model(config).double()
    batch = make_batch([9, 5, 8], [(3,), (), (0, 5)])
    return model, model.attention_inputs(batch.layout, batch.input_ids.device)


def _windows(inputs: AttentionInputs) -> list[int | None]:
    """Of the causal part of every layer."""
    return [
        next(part.window for part in layer.plan.parts if part.causal) for layer in inputs.by_layer
    ]


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ({"family": "gemma2", "sliding_window": 6}, [6, None, 6, None]),
        ({"family": "gemma2", "sliding_window": None}, [None] * 4),
        ({"family": "mistral", "sliding_window": 6}, [6] * 4),
        ({"family": "llama"}, [None] * 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("preset", ["dattn", "s_attn"])
def test_windows_alternate_in_gemma2_alone(preset, language, expected):
    _, inputs = _prepared(preset, **language)
    assert _windows(inputs) == expected


def test_equal_layers_share_a_plan():
    _, inputs = _prepared("s_attn", family="gemma2")
    first, second, third, fourth = (layer.plan for layer in inputs.by_layer)
    assert first is third
    assert second is fourth
    assert first is not second


@pytest.mark.parametrize("preset", ["dattn", "s_attn", "vidi", "cca"])
def test_every_layer_attends_as_the_oracle_says(preset):
    """Window, cap and scale together, on whatever tokens the layer scores."""
    model, inputs = _prepared(preset, family="gemma2")
    language = model.model_config.language
    layout = make_batch([9, 5, 8], [(3,), (), (0, 5)]).layout
    generator = torch.Generator().manual_seed(2)
    query, key, value = (
        torch.randn(layout.num_tokens, heads, 16, generator=generator, dtype=torch.float64) * 3
        for heads in (4, 2, 2)
    )
    rules = layer_rules(PRESETS[preset], LAYERS, skip_unread=True)
    for number, layer in enumerate(model.language_model.decoder.layers):
        own = inputs.layer(number + 1)
        first = own.plan.scored_tokens[0]
        out = layer.self_attention.core_attention(query[first:], key, value, None, None, own)
        expected = reference_attention(
            query,
            key,
            value,
            layout,
            rules[number].attention,
            own.rotary,
            score_function=ScoreFunction(7**-0.5, language.attn_logit_softcapping),
            window=None if number % 2 else language.sliding_window,
        )
        # Float64: sums in another order.
        torch.testing.assert_close(out, expected[first:].flatten(1), rtol=1e-11, atol=1e-11)


def test_a_backend_that_cannot_cap_is_refused_by_name():
    batch = make_batch([4])
    model = tiny_model(tiny_model_config(family="gemma2"), attention_backend="cpu_flash")
    with pytest.raises(Exception, match="softcap"):
        model(batch)
