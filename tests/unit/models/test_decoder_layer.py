"""What becomes of visual tokens from layer to layer, against a slow decoder that is told it by
hand.

The slow decoder has the model's norms, projections and FFN, and for attention the oracle over ALL
tokens of a layer with the whole preset; then it keeps of the result what the layer's word says. It
knows no layer rules, no plans and no savings.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.backends.base import ScoreFunction
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.positions import rotary_tables
from megatron_dattn.attention.reference import described_positions, reference_attention
from megatron_dattn.models.decoder_layer import DecoderLayer
from megatron_dattn.models.execution import ExactSavings
from megatron_dattn.models.vlm import DAttnVLM
from tests.support.vlm import make_batch, tiny_model, tiny_model_config

pytestmark = pytest.mark.usefixtures("one_process")

# Of each of five layers: "whole"; "half", of the FFN for visual tokens; "frozen"; "gone".
STORIES = {
    "s_attn": ["whole"] * 5,
    "shortv": ["whole"] * 2 + ["frozen"] * 3,
    "exit": ["whole"] * 3 + ["gone"] * 2,
    "yopo": ["half"] * 3 + ["gone"] * 2,
}
FAMILIES = {
    "mistral": {"sliding_window": 6},
    "gemma2": {"family": "gemma2", "sliding_window": 5},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
}
NOTHING = ExactSavings(visual_queries=False, folded_output=False, unread_tokens=False)
LAYOUT = make_batch([9, 5, 8], [(3,), (), (0, 5)], grid=(2, 3), budgets=(20, 24)).layout
VISUAL = LAYOUT.visual_budget


def _model(preset: str, family: str, savings: ExactSavings) -> DAttnVLM:
    # Four key heads, of which YOPO masks one.
    sizes = {"num_hidden_layers": 5, "num_key_value_heads": 4, **FAMILIES[family]}
    return tiny_model(tiny_model_config(preset, **sizes), savings=savings).double()


def _layer_outputs(model: DAttnVLM, tokens: Tensor) -> list[Tensor]:
    outputs: list[Tensor] = []
    for layer in model.language_model.decoder.layers:
        layer.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
    with torch.no_grad():
        model.language_model(tokens, model.attention_inputs(LAYOUT, tokens.device))
    return outputs


def _window(model: DAttnVLM, number: int) -> int | None:
    language = model.model_config.language
    slides = language.family == "mistral" or number in (0, 2, 4)
    return language.sliding_window if slides else None


def _attention(model: DAttnVLM, number: int, normed: Tensor, layout: TokenLayout) -> Tensor:
    """What attention adds to all tokens of a layout, by the oracle over all of them."""
    attention = model.language_model.decoder.layers[number].self_attention
    query, key, value = (x.squeeze(1) for x in attention.get_query_key_value_tensors(normed))
    language, config = model.model_config.language, model.attention
    positions = torch.tensor(described_positions(LAYOUT, config))
    scale = 7**-0.5 if language.family == "gemma2" else language.head_dim**-0.5
    rotary = rotary_tables(positions, language.head_dim, language.rope_theta)
    out = reference_attention(
        query,
        key,
        value,
        layout,
        config,
        (rotary[0][-layout.num_tokens :], rotary[1][-layout.num_tokens :]),
        score_function=ScoreFunction(scale, language.attn_logit_softcapping),
        head_mask=torch.tensor([1.0, 1.0, 1.0, 0.0]) if config.visual.heads < 1.0 else None,
        window=_window(model, number),
    )
    return attention.linear_proj(out.flatten(1).unsqueeze(1))[0]


def _ffn(layer: DecoderLayer, tokens: Tensor, share: float = 1.0) -> Tensor:
    """With the first `share` of the neurons."""
    gate, up = layer.mlp.linear_fc1.weight.chunk(2)
    used = int(share * len(gate))
    normed = layer.pre_mlp_layernorm(tokens)
    middle = layer.mlp.activation_func(normed @ gate[:used].T) * (normed @ up[:used].T)
    added = middle @ layer.mlp.linear_fc2.weight[:, :used].T
    return tokens + layer.post_feedforward_layernorm(added)


@torch.no_grad()
def _slow_outputs(model: DAttnVLM, tokens: Tensor, story: list[str]) -> list[Tensor]:
    outputs = []
    for number, word in enumerate(story):
        layer, layout = model.language_model.decoder.layers[number], LAYOUT
        if word == "gone":
            tokens, layout = (
                tokens[-LAYOUT.text_budget :],
                replace(LAYOUT, images=(), visual_budget=0),
            )
        added = _attention(model, number, layer.input_layernorm(tokens), layout)
        after = tokens + layer.post_attention_layernorm(added)
        before, after = tokens, _ffn(layer, after)
        if word == "half":
            attended = before + layer.post_attention_layernorm(added)
            after = torch.cat((_ffn(layer, attended[:VISUAL], 0.5), after[VISUAL:]))
        if word == "frozen":
            after = torch.cat((before[:VISUAL], after[VISUAL:]))
        tokens = after
        outputs.append(tokens)
    return outputs


def _tokens() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(LAYOUT.num_tokens, 1, 40, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("savings", [NOTHING, ExactSavings()], ids=["whole", "saving"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", STORIES)
def test_every_layer_does_what_is_told_of_it(
    preset: str, family: str, savings: ExactSavings
) -> None:
    model, story = _model(preset, family, savings), STORIES[preset]
    outputs = _layer_outputs(model, _tokens())
    for number, told in enumerate(_slow_outputs(model, _tokens(), story)):
        actual = outputs[number]
        # Nobody reads visual tokens behind this layer; only in S-Attn they predict.
        unread = savings.unread_tokens and number == 4 and preset != "s_attn"
        if unread or "gone" in story[number : number + 2]:
            told = told[-LAYOUT.text_budget :]
        # Padding attends to nothing and passes the FFN in both; float64 sums in another order.
        torch.testing.assert_close(actual, told, rtol=1e-10, atol=1e-11)


def test_the_stories_are_different_ones() -> None:
    """A decoder that forgot to freeze, or to let go, would be noticed."""
    for preset in ("shortv", "exit"):
        model = _model(preset, "mistral", NOTHING)
        last = [_slow_outputs(model, _tokens(), STORIES[name])[-1] for name in (preset, "s_attn")]
        told, plain = (tokens[-LAYOUT.text_budget :] for tokens in last)
        assert (told - plain).abs().max() > 1e-3
    assert PRESETS["yopo"].visual.heads < 1.0


def test_frozen_tokens_keep_their_state() -> None:
    outputs = _layer_outputs(_model("shortv", "mistral", NOTHING), _tokens())
    states = [tokens[:VISUAL] for tokens in (_tokens(), *outputs)]
    moved = [not torch.equal(a, b) for a, b in pairwise(states)]
    assert moved == [word != "frozen" for word in STORIES["shortv"]]
