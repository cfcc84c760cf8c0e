"""Floating-point operations of one training step, from the model's sizes and the packs' layouts.

Two countings, both with 2 operations per multiply-add and matrix products only:

`model_flops` is what the mathematics needs for the rows that carry content (padding is free,
recomputation is not counted). It is the numerator of MFU. With n visual and t text rows, hidden
size d, query width q = heads * head_dim, key/value width e, FFN width f, per decoder layer forward

    projections   2d(q + 2e) t + 2d * 2e n  (+ 2dq n where visual rows have queries)  ;  2qd (n + t)
    attention     4q * pairs;  s_attn: (n+t)^2/2   dattn: n t + t^2/2   (causal pairs: k(k+1)/2)
    FFN           6df (n + t)

plus 2d * vocabulary per labelled row. All layers count alike: W_o of a visual row is counted at
its full width and the last layer's visual rows are counted, as the paper's equations are written,
although both can be saved exactly. A product costs the same again for the gradient of its input
(where anything before it trains) and again for the gradient of its weight (where it trains).

`executed_flops` is what the engine runs today: padded rows, the fused QKV projection of visual
rows with a query nobody reads, and the forward pass repeated by full recomputation.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_dattn.attention import TokenLayout, attended_pairs, get_preset
from megatron_dattn.models.config import LanguageConfig, ModelConfig, VisionConfig

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
    packs = tuple(layouts)
    rows = [
        _Rows(
            visual=pack.num_visual_rows,
            text=pack.num_text_rows,
            visual_queries=pack.num_visual_rows if preset.scores_visual_rows else 0,
            visual_outputs=pack.num_visual_rows if preset.outputs_visual_rows else 0,
            pairs=sum(attended_pairs(pack, preset).values()),
            images=len(pack.images),
        )
        for pack in packs
    ]
    if labelled_rows is None:
        labelled_rows = sum(pack.num_text_rows for pack in packs)
    return _count(config, rows, labelled_rows, trained, recomputed=False)


def executed_flops(
    config: ModelConfig,
    layouts: Iterable[TokenLayout],
    *,
    trained: frozenset[str] = ALL_MODULES,
    labelled_rows: int | None = None,
    recompute: Literal["none", "selective", "full"] = "none",
) -> StepFlops:
    """Operations that the engine runs for the same packs; arguments as in `model_flops`.

    Attention is counted by attended pairs here too, so a backend that computes masked pairs, or
    recomputes scores in its backward, runs more.
    """
    preset = get_preset(config.attention)
    packs = tuple(layouts)
    below_language = bool(trained - {"language_model"})
    rows = [
        _Rows(
            visual=pack.visual_budget,
            text=pack.text_budget,
            visual_queries=pack.visual_budget,
            visual_outputs=pack.visual_budget,
            pairs=sum(attended_pairs(pack, preset).values()),
            # A pack without images sends a blank one through modules that train.
            images=len(pack.images) or int(below_language),
        )
        for pack in packs
    ]
    if labelled_rows is None:
        labelled_rows = sum(pack.num_text_rows for pack in packs)
    return _count(config, rows, labelled_rows, trained, recomputed=recompute == "full")


@dataclass(frozen=True)
class _Rows:
    """What of one pack is multiplied: row counts, attended pairs, images."""

    visual: int
    text: int
    visual_queries: int
    visual_outputs: int
    pairs: int
    images: int


def _count(
    config: ModelConfig,
    packs: list[_Rows],
    labelled_rows: int,
    trained: frozenset[str],
    recomputed: bool,
) -> StepFlops:
    unknown = trained - ALL_MODULES
    assert not unknown, f"no such modules: {sorted(unknown)}"
    images = sum(pack.images for pack in packs)
    counted = StepFlops(
        {
            "vision_encoder": _vision_encoder(
                config.vision, images, "vision_model" in trained, recomputed
            ),
            "adapter": _adapter(config, images, trained),
            "projections": PartFlops(),
            "attention": PartFlops(),
            "ffn": PartFlops(),
        }
    )
    for pack in packs:
        counted += _decoder(config.language, pack, trained, recomputed)
    # The loss always sends a gradient back through the head when anything trains.
    head = 2 * labelled_rows * config.language.hidden_size * config.language.vocab_size
    return counted + StepFlops({"head": _product(head, bool(trained), "language_model" in trained)})


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
    patches, d, f = config.num_patches, config.hidden_size, config.intermediate_size
    embedding = 2 * images * patches * (3 * config.patch_size**2) * d
    linear = 2 * images * patches * (4 * d * d + 2 * d * f) * config.num_used_layers
    scores = 4 * images * patches**2 * d * config.num_used_layers
    return (
        _product(embedding, False, trained)  # pixels need no gradient
        + _product(linear, trained, trained, recomputed)
        + _scores(scores, trained, recomputed)
    )


def _adapter(config: ModelConfig, images: int, trained: frozenset[str]) -> PartFlops:
    """The two layers of the MLP; the norm before them trains too and needs their gradient."""
    rows = images * config.vision.num_patches
    width = config.adapter.hidden_size or config.language.hidden_size
    forward = 2 * rows * width * (config.vision.hidden_size + config.language.hidden_size)
    own = "adapter" in trained
    return _product(forward, own or "vision_model" in trained, own)


def _decoder(
    config: LanguageConfig, pack: _Rows, trained: frozenset[str], recomputed: bool
) -> StepFlops:
    """All decoder layers over one pack.

    The first layer's text rows need no input gradient while the language model is frozen; this
    1 / num_hidden_layers of the text rows' share is counted all the same, as the engine computes
    it (text and visual rows stand in one tensor).
    """
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    query = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    rows = pack.visual + pack.text
    queries, outputs = pack.visual_queries + pack.text, pack.visual_outputs + pack.text
    projections = 2 * d * (queries * query + rows * 2 * key_value + outputs * query) * layers
    ffn = 2 * rows * 3 * d * f * layers
    scores = 4 * query * pack.pairs * layers
    backward, own = bool(trained), "language_model" in trained
    return StepFlops(
        {
            "projections": _product(projections, backward, own, recomputed),
            "attention": _scores(scores, backward, recomputed),
            "ffn": _product(ffn, backward, own, recomputed),
        }
    )
