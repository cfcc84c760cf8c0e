"""What decoder layers cost under a configuration: scored pairs and operations.

Two operations per multiply-add, forward, matrix products only. With n visual and t text tokens,
hidden size d, query width q = heads * head_dim, key/value width e and FFN width f, a layer costs

    projections   2d(q + 2e) t + 2d * 2e n  + 2dq n where visual tokens have queries
                  + 2qd t  + 2qd n where visual tokens have an attention output
    attention     4q * pairs
    FFN           6df t + 6d(share of f) n

and besides, where the configuration says so,

    reprojection  2(v + d) d n for encoder features of width v, through an MLP of width d
    cascade       2d * 2q t + 2d * 2e n for the cross-attention's own projections
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.layers import LayerRule, layer_rules
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.plan.patches import num_rings, ring_size
from megatron_dattn.attention.visual_config import rounded_share
from megatron_dattn.planner.layer_sizes import LayerSizes


@dataclass(frozen=True)
class LayerFlops:
    """Operations of a forward pass."""

    projections: int = 0
    attention: int = 0
    ffn: int = 0

    @property
    def total(self) -> int:
        return self.projections + self.attention + self.ffn

    def __add__(self, other: "LayerFlops") -> "LayerFlops":
        return LayerFlops(
            self.projections + other.projections,
            self.attention + other.attention,
            self.ffn + other.ffn,
        )


def decoder_flops(
    layout: TokenLayout,
    config: AttentionConfig,
    sizes: LayerSizes,
    num_layers: int,
    window: int | None = None,
) -> LayerFlops:
    """Operations of all layers over the valid tokens of a pack; nothing is skipped.

    `window` is the sliding window of every layer, as in `plan_attention`.
    """
    rules = layer_rules(config, num_layers, skip_unread=False)
    return sum((layer_flops(layout, rule, sizes, window) for rule in rules), LayerFlops())


def layer_flops(
    layout: TokenLayout, rule: LayerRule, sizes: LayerSizes, window: int | None = None
) -> LayerFlops:
    """Operations of one layer over the valid tokens of a pack."""
    layout, config = rule.layout(layout), rule.attention
    d, visual, text = sizes.hidden_size, layout.num_visual_tokens, layout.num_text_tokens
    query, key_value = sizes.query_width, sizes.key_value_width
    queries = text + visual * config.scores_visual_tokens
    outputs = text + visual * config.outputs_visual_tokens
    per_token = queries * query + (visual + text) * 2 * key_value + outputs * query
    if config.merge == "cascade" and visual:
        per_token += 2 * query * text + 2 * key_value * visual
    if config.visual.source == "reproject":
        per_token += (sizes.vision_hidden_size + d) * visual
    ffn = sizes.intermediate_size * text
    ffn += rounded_share(sizes.intermediate_size, rule.visual_ffn) * visual
    return LayerFlops(
        projections=2 * d * per_token,
        attention=4 * query * sum(attended_pairs(layout, config, window).values()),
        ffn=6 * d * ffn,
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
