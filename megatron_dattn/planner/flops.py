"""Floating-point operations of one training step, from the model's sizes and the packs' layouts.

Two countings, both with 2 operations per multiply-add and matrix products only:

`model_flops` is what the mathematics needs for the tokens that carry content (padding is free,
recomputation is not counted). It is the numerator of MFU. With n visual and t text tokens, hidden
size d, query width q = heads * head_dim, key/value width e, FFN width f, per decoder layer forward

    projections   2d(q + 2e) t + 2d * 2e n  (+ 2dq n where visual tokens have queries)  ;  2qd (n +
    t) attention     4q * pairs;  s_attn: (n+t)^2/2   dattn: n t + t^2/2   (causal pairs: k(k+1)/2)
    FFN           6df (n + t)

plus 2d * vocabulary per labelled token. W_o of a visual token is counted at its full width and the
last layer's visual tokens are counted, as the paper's equations are written, although both can be
saved exactly. A product costs the same again for the gradient of its input (where anything before
it trains) and again for the gradient of its weight (where it trains). Presets that freeze, drop,
select or reproject visual tokens count what their layers do (`planner/decoder_flops.py`).

`executed_flops` is what the engine runs: padded tokens, less what the exact savings leave out, and
the forward pass repeated by full recomputation, and the FFN's once more where it runs in chunks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_dattn.attention import AttentionConfig, get_preset
from megatron_dattn.attention.layers import LayerRule, layer_rules
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.execution import ExactSavings
from megatron_dattn.planner.part_flops import (
    LayerTokens,
    PartFlops,
    adapter,
    decoder,
    layer_tokens,
    product,
    vision_encoder,
)

ALL_MODULES = frozenset({"vision_model", "adapter", "language_model"})


@dataclass(frozen=True)
class StepFlops:
    """Operations by part: vision_encoder, adapter, projections, attention, ffn, head."""

    parts: dict[str, PartFlops]

    def __add__(self, other: "StepFlops") -> "StepFlops":
        names = dict.fromkeys((*self.parts, *other.parts))
        zero = PartFlops()
        return StepFlops(
            {name: self.parts.get(name, zero) + other.parts.get(name, zero) for name in names}
        )

    @property
    def forward(self) -> int:
        return sum(part.forward for part in self.parts.values())

    @property
    def backward(self) -> int:
        return sum(part.backward for part in self.parts.values())

    @property
    def total(self) -> int:
        return self.forward + self.backward


def model_flops(
    config: ModelConfig,
    layouts: Iterable[TokenLayout],
    *,
    trained: frozenset[str] = ALL_MODULES,
    labelled_tokens: int | None = None,
    attention: str | None = None,
) -> StepFlops:
    """Operations that the mathematics of one forward and backward pass over the packs needs.

    Args:
        layouts: the packs of one step (or of one rank's share of it).
        trained: names of the modules with a learning rate above 0; empty counts a forward pass.
        labelled_tokens: text tokens with a label over all packs; every valid text token where None.
        attention: another preset to count for, e.g. "s_attn" beside "dattn".
    """
    preset = get_preset(attention) if attention else config.preset
    rules = layer_rules(preset, config.language.num_hidden_layers, skip_unread=False)
    packs = tuple(layouts)
    layers = _layers(config, packs, rules)
    images = sum(len(pack.images) for pack in packs)
    if labelled_tokens is None:
        labelled_tokens = sum(pack.num_text_tokens for pack in packs)
    return _count(
        config,
        preset,
        layers,
        images,
        labelled_tokens,
        trained,
        vocabulary=config.language.vocab_size,
        recomputed=False,
    )


def executed_flops(
    config: ModelConfig,
    layouts: Iterable[TokenLayout],
    *,
    trained: frozenset[str] = ALL_MODULES,
    labelled_tokens: int | None = None,
    recompute: Literal["none", "selective", "full"] = "none",
    savings: ExactSavings | None = None,
) -> StepFlops:
    """Operations that the engine runs for the same packs; arguments as in `model_flops`.

    Attention is counted by attended pairs here too, so a backend that computes masked pairs, or
    recomputes scores in its backward, runs more.
    """
    savings = savings or ExactSavings()
    preset = config.preset
    num_layers = config.language.num_hidden_layers
    rules = layer_rules(preset, num_layers, skip_unread=savings.unread_tokens)
    packs = tuple(layouts)
    layers = _layers(config, packs, rules, savings)
    # A pack without images sends a blank one through modules that train.
    blank = int(bool(trained - {"language_model"}))
    images = sum(len(pack.images) or blank for pack in packs)
    if not savings.labelled_logits:
        labelled_tokens = sum(pack.text_budget for pack in packs)
    elif labelled_tokens is None:
        labelled_tokens = sum(pack.num_text_tokens for pack in packs)
    return _count(
        config,
        preset,
        layers,
        images,
        labelled_tokens,
        trained,
        vocabulary=config.language.padded_vocab_size,
        recomputed=recompute == "full",
    )


def _layers(
    config: ModelConfig,
    packs: tuple[TokenLayout, ...],
    rules: tuple[LayerRule, ...],
    executed: ExactSavings | None = None,
) -> list[LayerTokens]:
    """Every layer for every pack. Layers with equal rules and windows are counted once."""
    kinds = [(rule, config.language.window(number)) for number, rule in enumerate(rules)]
    counted: list[LayerTokens] = []
    for pack in packs:
        of_kind = {
            (rule, window): layer_tokens(config, pack, rule, window, executed)
            for rule, window in dict.fromkeys(kinds)
        }
        counted += (of_kind[kind] for kind in kinds)
    return counted


def _count(
    config: ModelConfig,
    preset: AttentionConfig,
    layers: list[LayerTokens],
    images: int,
    labelled_tokens: int,
    trained: frozenset[str],
    *,
    vocabulary: int,
    recomputed: bool,
) -> StepFlops:
    unknown = trained - ALL_MODULES
    assert not unknown, f"no such modules: {sorted(unknown)}"
    vision = vision_encoder(config.vision, images, "vision_model" in trained, recomputed)
    # The loss always sends a gradient back through the head when anything trains.
    head = 2 * labelled_tokens * config.language.hidden_size * vocabulary
    parts = {
        "vision_encoder": vision,
        "adapter": adapter(config, preset, images, trained),
        **decoder(config, layers, trained, recomputed),
        "head": product(head, bool(trained), "language_model" in trained),
    }
    return StepFlops(parts)
