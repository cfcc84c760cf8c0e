"""What decoder layers cost under an attention, by sizes alone: for presets without a model.

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

from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.layers import LayerRule, layer_rules
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.visual_config import rounded_share
from megatron_dattn.planner.layer_sizes import LayerSizes
from megatron_dattn.planner.part_flops import attended_pairs


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
