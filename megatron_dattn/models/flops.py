"""Floating-point operations of one training step, from the model's sizes and the packs' layouts.

Two countings, both with 2 operations per multiply-add and matrix products only:

`model_flops` is what the mathematics needs for the rows that carry content (padding is free,
recomputation is not counted). It is the numerator of MFU. With n visual and t text rows, hidden
size d, query width q = heads * head_dim, key/value width e, FFN width f, per decoder layer forward

    projections   2d(q + 2e) t + 2d * 2e n  (+ 2dq n where visual rows have queries)  ;  2qd (n + t)
    attention     4q * pairs;  s_attn: (n+t)^2/2   dattn: n t + t^2/2   (causal pairs: k(k+1)/2)
    FFN           6df (n + t)

plus 2d * vocabulary per labelled row. W_o of a visual row is counted at its full width and the last
layer's visual rows are counted, as the paper's equations are written, although both can be saved
exactly. A product costs the same again for the gradient of its input (where anything before it
trains) and again for the gradient of its weight (where it trains). Presets that freeze, drop,
select or reproject visual rows count what their layers do (`attention/cost.py`).

`executed_flops` is what the engine runs: padded rows, less what the exact savings leave out, and
the forward pass repeated by full recomputation.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_dattn.attention import (
    AttentionConfig,
    LayerRule,
    TokenLayout,
    attended_pairs,
    get_preset,
    kept_grid,
    layer_rules,
)
from megatron_dattn.models.config import ExactSavings, ModelConfig, VisionConfig

ALL_MODULES = frozenset({"vision_model", "adapter", "language_model"})


@dataclass(frozen=True)
class PartFlops:
    """Operations of one part of the model, forward and backward."""

    forward: int = 0
    backward: int = 0

    def __add__(self, other: "PartFlops") -> "PartFlops":
        return PartFlops(self.forward + other.forward, self.backward + other.backward)

    @property
    def total(self) -> int:
        return self.forward + self.backward


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
    labelled_rows: int | None = None,
    attention: str | None = None,
) -> StepFlops:
    """Operations that the mathematics of one forward and backward pass over the packs needs.

    Args:
        layouts: the packs of one step (or of one rank's share of it).
        trained: names of the modules with a learning rate above 0; empty counts a forward pass.
        labelled_rows: text rows with a label over all packs; every valid text row where None.
        attention: another preset to count for, e.g. "s_attn" beside "dattn".
    """
    preset = get_preset(attention or config.attention)
    rules = layer_rules(preset, config.language.num_hidden_layers, skip_unread=False)
    packs = tuple(layouts)
    layers = [
        _layer_rows(config, pack, rule, config.language.window(number))
        for pack in packs
        for number, rule in enumerate(rules)
    ]
    images = sum(len(pack.images) for pack in packs)
    if labelled_rows is None:
        labelled_rows = sum(pack.num_text_rows for pack in packs)
    return _count(
        config,
        preset,
        layers,
        images,
        labelled_rows,
        trained,
        vocabulary=config.language.vocab_size,
        recomputed=False,
    )


def executed_flops(
    config: ModelConfig,
    layouts: Iterable[TokenLayout],
    *,
    trained: frozenset[str] = ALL_MODULES,
    labelled_rows: int | None = None,
    recompute: Literal["none", "selective", "full"] = "none",
    savings: ExactSavings | None = None,
) -> StepFlops:
    """Operations that the engine runs for the same packs; arguments as in `model_flops`.

    Attention is counted by attended pairs here too, so a backend that computes masked pairs, or
    recomputes scores in its backward, runs more.
    """
    savings = savings or ExactSavings()
    preset = get_preset(config.attention)
    num_layers = config.language.num_hidden_layers
    rules = layer_rules(preset, num_layers, skip_unread=savings.unread_rows)
    packs = tuple(layouts)
    layers = [
        _layer_rows(config, pack, rule, config.language.window(number), savings)
        for pack in packs
        for number, rule in enumerate(rules)
    ]
    # A pack without images sends a blank one through modules that train.
    blank = int(bool(trained - {"language_model"}))
    images = sum(len(pack.images) or blank for pack in packs)
    if not savings.labelled_logits:
        labelled_rows = sum(pack.text_budget for pack in packs)
    elif labelled_rows is None:
        labelled_rows = sum(pack.num_text_rows for pack in packs)
    return _count(
        config,
        preset,
        layers,
        images,
        labelled_rows,
        trained,
        vocabulary=config.language.padded_vocab_size,
        recomputed=recompute == "full",
    )


@dataclass(frozen=True)
class _LayerRows:
    """What one layer multiplies with its weights for one pack."""

    queries: int
    keys: int
    outputs: float
    """Full-width output projections; a folded one is 1 / (query heads per key head)."""
    ffn: float
    """Rows through the FFN; those that pass a share of it count as that share."""
    pairs: int
    cross_text: int = 0
    """Rows that a cross-attention of the layer's own reads from, and those it reads."""
    cross_visual: int = 0
    projected: int = 0
    """Visual rows that the layer makes from the encoder's features."""


def _layer_rows(
    config: ModelConfig,
    pack: TokenLayout,
    rule: LayerRule,
    window: int | None,
    executed: ExactSavings | None = None,
) -> _LayerRows:
    """By the mathematics, or as executed: with padding, and with these savings."""
    pack, attention = rule.layout(pack), rule.attention
    text, visual = pack.num_text_rows, pack.num_visual_rows
    queries, folding = attention.scores_visual_rows, 1
    if executed is not None:
        text, visual = pack.text_budget, pack.visual_budget
        queries = queries or not executed.visual_queries
        if attention.v2v == "diagonal" and executed.folded_output:
            language = config.language
            folding = language.num_attention_heads // language.num_key_value_heads
    cascade = attention.merge == "cascade" and rule.sees_images
    return _LayerRows(
        queries=text + visual * queries,
        keys=text + visual,
        outputs=text + visual * attention.outputs_visual_rows / folding,
        ffn=text + visual * rule.visual_ffn,
        pairs=sum(attended_pairs(pack, attention, window).values()),
        cross_text=text * cascade,
        cross_visual=visual * cascade,
        projected=visual * (attention.visual.source == "reproject"),
    )


def _count(
    config: ModelConfig,
    preset: AttentionConfig,
    layers: list[_LayerRows],
    images: int,
    labelled_rows: int,
    trained: frozenset[str],
    *,
    vocabulary: int,
    recomputed: bool,
) -> StepFlops:
    unknown = trained - ALL_MODULES
    assert not unknown, f"no such modules: {sorted(unknown)}"
    vision = _vision_encoder(config.vision, images, "vision_model" in trained, recomputed)
    # The loss always sends a gradient back through the head when anything trains.
    head = 2 * labelled_rows * config.language.hidden_size * vocabulary
    parts = {
        "vision_encoder": vision,
        "adapter": _adapter(config, preset, images, trained),
        **_decoder(config, layers, trained, recomputed),
        "head": _product(head, bool(trained), "language_model" in trained),
    }
    return StepFlops(parts)


def _product(
    forward: int, input_gradient: bool, weight_gradient: bool, recomputed: bool = False
) -> PartFlops:
    """A product with a weight: each gradient costs as much as the forward pass.

    Recomputation belongs to the backward pass and happens only if there is one.
    """
    gradients = input_gradient + weight_gradient
    return PartFlops(forward, forward * (gradients + (recomputed and gradients > 0)))


def _scores(forward: int, has_gradient: bool, recomputed: bool) -> PartFlops:
    """Attention scores: dV, dP, dQ, dK backward against QK^T and PV forward."""
    return PartFlops(forward, forward * has_gradient * (2 + recomputed))


def _vision_encoder(
    config: VisionConfig, images: int, trained: bool, recomputed: bool
) -> PartFlops:
    """Patch embedding and bidirectional layers up to the feature layer, per image."""
    patches, d, f = config.num_places, config.hidden_size, config.intermediate_size
    embedding = 2 * images * config.num_patches * (3 * config.patch_size**2) * d
    linear = 2 * images * patches * (4 * d * d + 2 * d * f) * config.num_used_layers
    scores = 4 * images * patches**2 * d * config.num_used_layers
    return (
        _product(embedding, False, trained)  # pixels need no gradient
        + _product(linear, trained, trained, recomputed)
        + _scores(scores, trained, recomputed)
    )


def _adapter(
    config: ModelConfig, preset: AttentionConfig, images: int, trained: frozenset[str]
) -> PartFlops:
    """The two layers of the MLP; the norm before them trains too and needs their gradient.

    Where every decoder layer projects the features itself, there is no adapter.
    """
    if preset.visual.source == "reproject":
        return PartFlops()
    rows, columns = kept_grid(config.vision.grid, preset.visual)
    width = config.adapter.hidden_size or config.language.hidden_size
    widths = config.vision.hidden_size + config.language.hidden_size
    own = "adapter" in trained
    return _product(
        2 * images * rows * columns * width * widths, own or "vision_model" in trained, own
    )


def _decoder(
    config: ModelConfig, layers: list[_LayerRows], trained: frozenset[str], recomputed: bool
) -> dict[str, PartFlops]:
    """All decoder layers over all packs.

    The first layer's text rows need no input gradient while the language model is frozen; this
    1 / num_hidden_layers of the text rows' share is counted all the same, as the engine computes
    it (text and visual rows stand in one tensor).
    """
    language = config.language
    d, f = language.hidden_size, language.intermediate_size
    query = language.num_attention_heads * language.head_dim
    key_value = 2 * language.num_key_value_heads * language.head_dim
    own, added, pairs, ffn = 0.0, 0, 0, 0.0
    for rows in layers:
        own += rows.queries * query + rows.keys * key_value + rows.outputs * query
        added += rows.cross_text * 2 * query + rows.cross_visual * key_value
        added += rows.projected * (config.vision.hidden_size + d)
        ffn += rows.ffn * 3 * f
        pairs += rows.pairs
    backward, trains = bool(trained), "language_model" in trained
    # Weights that the preset adds to a layer learn at the adapter's rate.
    added_part = _product(2 * d * added, backward, "adapter" in trained, recomputed)
    return {
        "projections": _product(round(2 * d * own), backward, trains, recomputed) + added_part,
        "attention": _scores(4 * query * pairs, backward, recomputed),
        "ffn": _product(round(2 * d * ffn), backward, trains, recomputed),
    }
