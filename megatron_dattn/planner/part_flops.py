"""Operations of the model's parts, forward and backward: what `flops.py` adds up.

Which tokens pass which weights of a layer, and which pairs of them have a score, is decided here,
once, for both of its countings.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_dattn.attention import AttentionConfig
from megatron_dattn.attention.layers import LayerRule
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.plan.patches import num_rings, ring_size
from megatron_dattn.attention.visual_config import kept_grid
from megatron_dattn.models.config import ModelConfig, VisionConfig
from megatron_dattn.models.execution import ExactSavings


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
class LayerTokens:
    """What one layer multiplies with its weights for one pack."""

    queries: int
    keys: int
    outputs: float
    """Full-width output projections; a folded one is 1 / (query heads per key head)."""
    ffn: float
    """Tokens through the FFN; those that pass a share of it count as that share."""
    ffn_again: float
    """Those of them that pass it in chunks, which the backward pass repeats."""
    pairs: int
    cross_text: int = 0
    """Tokens that a cross-attention of the layer's own reads from, and those it reads."""
    cross_visual: int = 0
    projected: int = 0
    """Visual tokens that the layer makes from the encoder's features."""


def layer_tokens(
    config: ModelConfig,
    pack: TokenLayout,
    rule: LayerRule,
    window: int | None,
    executed: ExactSavings | None = None,
) -> LayerTokens:
    """By the mathematics, or as executed: with padding, and with these savings."""
    pack, attention = rule.layout(pack), rule.attention
    text, visual = pack.num_text_tokens, pack.num_visual_tokens
    queries, folding, chunk = attention.scores_visual_tokens, 1, 0
    if executed is not None:
        text, visual = pack.text_budget, pack.visual_budget
        queries = queries or not executed.visual_queries
        chunk = executed.ffn_chunk_tokens
        if attention.v2v == "diagonal" and executed.folded_output:
            language = config.language
            folding = language.num_attention_heads // language.num_key_value_heads
    cascade = attention.merge == "cascade" and rule.sees_images
    # Visual tokens that pass a share of the FFN pass it by themselves.
    passes = [(text + visual, 1.0)]
    if rule.visual_ffn != 1.0 and visual:
        passes = [(text, 1.0), (visual, rule.visual_ffn)]
    return LayerTokens(
        queries=text + visual * queries,
        keys=text + visual,
        outputs=text + visual * attention.outputs_visual_tokens / folding,
        ffn=sum(tokens * share for tokens, share in passes),
        ffn_again=sum(tokens * share for tokens, share in passes if 0 < chunk < tokens),
        pairs=sum(attended_pairs(pack, attention, window).values()),
        cross_text=text * cascade,
        cross_visual=visual * cascade,
        projected=visual * (attention.visual.source == "reproject"),
    )


def attended_pairs(
    layout: TokenLayout, config: AttentionConfig, window: int | None = None
) -> dict[str, int]:
    """(query, key) pairs with a score, over all samples of the pack, by kind; equal for all heads.

    A diagonal token's softmax over itself has no score. `window` is the layer's sliding window, as
    in `plan_attention`.
    """
    if config.window_in_reading_order and window is not None:
        pairs = _windowed_pairs(layout, window)
        return pairs if config.scores_visual_tokens else pairs | {"V2V": 0, "V2T": 0}
    pairs = {
        "V2V": _visual_pairs(layout, config, window),
        "V2T": 0,
        "T2V": 0,
        "T2T": sum(_causal_pairs(length, window) for length in layout.text_lengths),
    }
    for image in layout.images:
        before, length = image.text_offset, layout.text_lengths[image.sample]
        following = length - before
        if config.t2v.window == "inherit" and window is not None:
            following = min(following, window - 1)
        seeing = following + before if config.t2v.scope == "all" else following
        pairs["T2V"] += image.num_tokens * seeing
        if config.v2t == "prompt":
            before = max(before, layout.prompt_length(image.sample))
        if config.v2t != "none":
            pairs["V2T"] += image.num_tokens * before
    return pairs


def _causal_pairs(length: int, window: int | None) -> int:
    full = length if window is None else min(length, window)
    return full * (full + 1) // 2 + (length - full) * full


def _windowed_pairs(layout: TokenLayout, window: int) -> dict[str, int]:
    """Under a window that counts tokens in reading order, whoever has queries."""
    pairs = dict.fromkeys(("V2V", "V2T", "T2V", "T2T"), 0)
    for sample in range(layout.num_samples):
        runs = layout.runs(sample)
        visual = torch.cat([torch.full((run.end - run.start,), run.is_visual) for run in runs])
        visual_before = F.pad(visual.cumsum(0), (1, 0))
        ends = torch.arange(1, len(visual) + 1)
        starts = (ends - window).clamp(min=0)
        seen = visual_before[ends] - visual_before[starts]
        seen_text = ends - starts - seen
        for kind, tokens in (("V", visual), ("T", ~visual)):
            pairs[f"{kind}2V"] += int(seen[tokens].sum())
            pairs[f"{kind}2T"] += int(seen_text[tokens].sum())
    return pairs


def _visual_pairs(layout: TokenLayout, config: AttentionConfig, window: int | None) -> int:
    if config.v2v == "causal":
        return sum(_causal_pairs(length, window) for length in layout.visual_lengths)
    pairs = 0
    if config.v2v == "ring":
        for image, (start, _) in zip(layout.images, layout.image_tokens, strict=True):
            seen = start - layout.visual_tokens(image.sample)[0]
            for ring in range(num_rings(image.grid)):
                size = ring_size(image.grid, ring)
                seen += size
                pairs += size * seen
    if config.v2v_window is not None:
        for image in layout.images:
            height, width = image.grid
            pairs += _near_pairs(height, config.v2v_window) * _near_pairs(width, config.v2v_window)
    return pairs


def _near_pairs(length: int, window: int) -> int:
    """Ordered pairs of places on a line that a window around the first has in common with it."""
    reach = window // 2
    return sum(max(0, length - abs(offset)) for offset in range(-reach, reach + 1))


def product(
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


def vision_encoder(config: VisionConfig, images: int, trained: bool, recomputed: bool) -> PartFlops:
    """Patch embedding and bidirectional layers up to the feature layer, per image."""
    patches, d, f = config.num_places, config.hidden_size, config.intermediate_size
    embedding = 2 * images * config.num_patches * (3 * config.patch_size**2) * d
    linear = 2 * images * patches * (4 * d * d + 2 * d * f) * config.num_used_layers
    scores = 4 * images * patches**2 * d * config.num_used_layers
    return (
        product(embedding, False, trained)  # pixels need no gradient
        + product(linear, trained, trained, recomputed)
        + _scores(scores, trained, recomputed)
    )


def adapter(
    config: ModelConfig, preset: AttentionConfig, images: int, trained: frozenset[str]
) -> PartFlops:
    """The two layers of the MLP. Their input has a gradient wherever they train: a norm before them
    needs it, and without one megatron-core's linear layers compute it all the same.

    Not counted: the MLPs of fractional positions, whose tokens are an image's sides, once per pack.

    Where every decoder layer projects the features itself, there is no adapter.
    """
    if preset.visual.source == "reproject":
        return PartFlops()
    rows, columns = kept_grid(config.vision.grid, preset.visual)
    width = config.adapter.hidden_size or config.language.hidden_size
    widths = config.vision.hidden_size + config.language.hidden_size
    own = "adapter" in trained
    return product(
        2 * images * rows * columns * width * widths, own or "vision_model" in trained, own
    )


def decoder(
    config: ModelConfig, layers: list[LayerTokens], trained: frozenset[str], recomputed: bool
) -> dict[str, PartFlops]:
    """All decoder layers over all packs.

    The first layer's text tokens need no input gradient while the language model is frozen; this
    1 / num_hidden_layers of the text tokens' share is counted all the same, as the engine computes
    it (text and visual tokens stand in one tensor).
    """
    language = config.language
    d, f = language.hidden_size, language.intermediate_size
    query = language.num_attention_heads * language.head_dim
    key_value = 2 * language.num_key_value_heads * language.head_dim
    own, added, pairs, ffn, again = 0.0, 0, 0, 0.0, 0.0
    for tokens in layers:
        own += tokens.queries * query + tokens.keys * key_value + tokens.outputs * query
        added += tokens.cross_text * 2 * query + tokens.cross_visual * key_value
        added += tokens.projected * (config.vision.hidden_size + d)
        ffn += tokens.ffn * 3 * f
        again += tokens.ffn_again * 3 * f
        pairs += tokens.pairs
    backward, trains = bool(trained), "language_model" in trained
    # Weights that the preset adds to a layer learn at the adapter's rate.
    added_part = product(2 * d * added, backward, "adapter" in trained, recomputed)
    return {
        "projections": product(round(2 * d * own), backward, trains, recomputed) + added_part,
        "attention": _scores(4 * query * pairs, backward, recomputed),
        "ffn": product(round(2 * d * ffn), backward, trains, recomputed)
        + PartFlops(0, round(2 * d * again) * backward),
    }
