"""What each decoder layer does with visual tokens, and which tokens predict after the last one.

Layers differ for two reasons. A preset may freeze visual tokens in some layers or let them leave
after one. And what no later layer reads need not be computed: in the last layer that sees images,
visual tokens give keys and values, but need no output, unless they predict tokens themselves.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.plan.patches import last_of_centre
from megatron_dattn.attention.visual_config import num_shared, rounded_share
from megatron_dattn.errors import ConfigError


@dataclass(frozen=True)
class LayerRule:
    """One layer. Equal rules share one plan."""

    attention: AttentionConfig
    """The configuration of this layer: its v2v and v2t are "none" where visual tokens stay, and its
    window counts what it counts elsewhere."""
    sees_images: bool = True
    """Whether visual tokens are still there to be read."""
    visual_ffn: float = 1.0
    """Share of the FFN's neurons for visual tokens."""

    def layout(self, layout: TokenLayout) -> TokenLayout:
        """The pack as this layer sees it, for planning: text tokens alone once images are gone."""
        return layout if self.sees_images else replace(layout, images=(), visual_budget=0)


@lru_cache(maxsize=64)  # every step asks for those of its model
def layer_rules(
    config: AttentionConfig, num_layers: int, *, skip_unread: bool
) -> tuple[LayerRule, ...]:
    """The rule of every layer of a decoder, first to last.

    `skip_unread` leaves out what no later layer reads; outputs that are read do not change by it.

    Raises ConfigError for a range of frozen layers that has none at this depth.
    """
    tokens = config.visual
    last = num_shared(num_layers, tokens.exit) - 1
    frozen = _frozen_layers(config, num_layers)
    if skip_unread and not config.visual_tokens_predict:
        frozen.add(last)
    still = _without_visual_queries(config)
    rules = []
    for layer in range(num_layers):
        if layer in frozen or layer > last:
            rules.append(LayerRule(still, layer <= last, 0.0))
        else:
            rules.append(LayerRule(config, True, tokens.ffn))
    return tuple(rules)


def output_tokens(layout: TokenLayout, config: AttentionConfig) -> Tensor:
    """The packed token that predicts the label of each text token, int64 [text_budget].

    It is the text token itself, unless visual tokens read the text before them (v2t is not "none"):
    then a text token directly followed by an image would predict the next text token without that
    image, so the image predicts in its place (the last image, if several follow each other), as in
    LLaVA. Its last token does, or under v2v="ring" the last of its centre: the tokens that see all
    of the image. Where visual tokens read no text they know nothing of what was said and cannot
    predict, nor where they are frozen or gone before the last layer; text that sees only earlier
    images then predicts without the one that follows.
    """
    tokens = torch.arange(layout.visual_budget, layout.num_tokens)
    if not config.visual_tokens_predict:
        return tokens
    for image, (start, end) in zip(layout.images, layout.image_tokens, strict=True):
        if image.text_offset == 0:
            continue
        if config.v2v == "ring":
            end = start + last_of_centre(image.grid) + 1
        tokens[layout.text_cu_seqlens[image.sample] + image.text_offset - 1] = end - 1
    return tokens


def _without_visual_queries(config: AttentionConfig) -> AttentionConfig:
    """The same attention of text tokens; visual tokens attend to nothing.

    A window that counted visual tokens goes on counting them. Ids that no score uses any more are
    left out; the model's positions are those of its own configuration in all layers.
    """
    visual = config.positions.visual if config.t2v.rotary else "none"
    return replace(
        config,
        v2v="none",
        v2v_window=None,
        v2t="none",
        positions=replace(config.positions, visual=visual),
        window="reading_order" if config.window_in_reading_order else config.window,
    )


def _frozen_layers(config: AttentionConfig, num_layers: int) -> set[int]:
    """Layers counted from 0. Visual tokens that predict need the last one
    (`visual_tokens_predict`), so a range that ends before 1 never reaches it, however its end is
    rounded."""
    if config.visual.frozen is None:
        return set()
    first, end = (rounded_share(num_layers, share) for share in config.visual.frozen)
    if config.visual.frozen[1] < 1.0:
        end = min(end, num_layers - 1)
    if first >= end:
        raise ConfigError(
            f"attention: visual.frozen={config.visual.frozen} is none of {num_layers} layers; make "
            "the range longer or leave it out"
        )
    return set(range(first, end))
