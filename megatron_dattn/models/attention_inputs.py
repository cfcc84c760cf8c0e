"""What the decoder layers need to know about a micro-batch, prepared once for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_dattn.attention import AttentionConfig
from megatron_dattn.attention.attention_maps import ReportInputs, ReportPlan, plan_report
from megatron_dattn.attention.backends.base import Backend, ScoreFunction
from megatron_dattn.attention.decomposed import ImagesElsewhere
from megatron_dattn.attention.layers import LayerRule
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.plan.parts import AttentionPlan, plan_attention, plans_to_device
from megatron_dattn.attention.positions import token_positions
from megatron_dattn.attention.reading_order import ReadingOrder
from megatron_dattn.attention.transfer import to_device
from megatron_dattn.models.config import LanguageConfig
from megatron_dattn.models.kv_cache import DecodeStep, KVCache
from megatron_dattn.models.observer import AttentionObserver
from megatron_dattn.parallel.context.shares import ContextShare
from megatron_dattn.parallel.sequence import SequenceLayout


@dataclass(frozen=True)
class LayerInputs:
    """What one layer needs."""

    rule: LayerRule
    plan: AttentionPlan
    """Over all tokens, or over the text tokens alone in a layer that sees no images. With a cache:
    over its tokens and those of this pass. A decode step has a plan of its own instead."""
    rotary: tuple[Tensor, Tensor]
    """Cosine and sine of the plan's tokens, each [tokens, head_dim]."""
    shards: SequenceLayout
    """Of the tokens that pass the layer."""
    backend: Backend
    score_function: ScoreFunction
    elsewhere: ImagesElsewhere | None = None
    """The images of other context-parallel ranks; None where there are none to be read."""
    cache: KVCache | None = None
    """Where keys and values stay for later passes (generation); the tokens are on one rank then."""
    step: DecodeStep | None = None
    """In generation after the first pass: text tokens alone, one of each sample."""
    observer: AttentionObserver | None = None
    """Who is shown the layer's queries and keys; None in nearly every step."""
    report: ReportPlan | None = None
    """For the observer: the same attention in packed order, taken apart."""
    places: Tensor | None = None
    """For the observer: where each packed token passes, int64 [tokens]; None for packed order."""

    @property
    def has_images(self) -> bool:
        """True if there are visual tokens to be read, in this pass or in a cache."""
        if self.step is not None:
            return self.step.cache.images is not None
        return self.plan.num_visual_tokens > 0

    @torch.no_grad()
    def show(self, layer_number: int, query: Tensor, key: Tensor) -> None:
        """Show projections to the observer, if there is one; full recomputation does so twice.

        Args:
            layer_number: from 1.
            query: as projected, [scored tokens, query heads, head_dim], of the model's dtype.
            key: as projected, [tokens, key heads, head_dim], same dtype.
        """
        if self.observer is None:
            return
        assert self.report is not None, "an observer comes with a report's plan"
        rotary, query, key = self.rotary, query.detach(), key.detach()
        if self.places is not None:
            cos, sin, query, key = (x[self.places] for x in (*rotary, query, key))
            rotary = cos, sin
        inputs = ReportInputs(self.report, rotary, self.score_function, self.backend)
        self.observer(layer_number, query, key, inputs)


@dataclass(frozen=True)
class AttentionInputs:
    """What all layers need. Layers with equal rules and windows share a plan."""

    by_layer: tuple[LayerInputs, ...]
    """Of the whole decoder, first to last, whatever the pipeline stage."""
    shards: SequenceLayout
    """Of the tokens that enter the decoder."""
    order: ReadingOrder | None = None
    """In which they do; None for packed order."""
    order_tokens: Tensor | None = None
    """`order.tokens` on the device."""

    def layer(self, number: int) -> LayerInputs:
        """Inputs of the layer that megatron-core counts as `number`, from 1."""
        return self.by_layer[number - 1]

    def with_caches(self, caches: Sequence[KVCache]) -> "AttentionInputs":
        """The same for layers that keep their keys and values, each in its own cache."""
        pairs = zip(self.by_layer, caches, strict=True)
        return replace(self, by_layer=tuple(replace(layer, cache=cache) for layer, cache in pairs))

    def reads_images(self, number: int) -> bool:
        """True if that layer exists and sees images."""
        return number <= len(self.by_layer) and self.layer(number).rule.sees_images


def prepare_attention(
    layout: TokenLayout,
    config: AttentionConfig,
    rules: tuple[LayerRule, ...],
    shards: SequenceLayout,
    backend: Backend,
    *,
    language: LanguageConfig,
    device: torch.device,
    observer: AttentionObserver | None = None,
    order: ReadingOrder | None = None,
    share: ContextShare | None = None,
    elsewhere: ImagesElsewhere | None = None,
) -> AttentionInputs:
    """Plans and rotary tables of a pack.

    Args:
        layout: of the pack; of this rank's share where there is one.
        config: of the model; its positions hold in all layers.
        rules: one per layer, see `layer_rules`.
        shards: of the tokens as they pass.
        language: gives the layers' sliding windows, the score function, the rotary angles.
        order: in which the tokens pass, where all layers know one kind.
        share: what this context-parallel rank has of the pack.
        elsewhere: what reads the images of the others.
    """
    # A plan is host work and index tensors on the device: one per kind of layer, not per layer.
    layers = [(rule, language.window(number)) for number, rule in enumerate(rules)]
    kinds = list(dict.fromkeys(layers))
    passing = layout if order is None else order.layout
    plans, (positions, *order_tokens) = plans_to_device(
        [plan_attention(r.layout(passing), r.attention, window=window) for r, window in kinds],
        [_positions(passing, config, share), *([] if order is None else [order.tokens])],
        device,
    )
    cos, sin = language.rotary_tables(positions, device)
    prepared: dict[tuple[LayerRule, int | None], LayerInputs] = {}
    for (rule, window), plan in zip(kinds, plans, strict=True):
        seen = rule.layout(layout)
        prepared[rule, window] = LayerInputs(
            rule=rule,
            plan=plan,
            # Text tokens stand last, also where a layer sees nothing else.
            rotary=(cos[-seen.num_tokens :], sin[-seen.num_tokens :]),
            shards=shards if rule.sees_images else shards.text_alone(),
            backend=backend,
            score_function=language.score_function,
            elsewhere=elsewhere if rule.sees_images else None,
            observer=observer,
            report=None
            if observer is None
            else plan_report(seen, rule.attention, device, window=window),
            places=None if observer is None or order is None else to_device(order.places, device),
        )
    by_layer = tuple(prepared[layer] for layer in layers)
    return AttentionInputs(by_layer, shards, order, *order_tokens)


def _positions(layout: TokenLayout, config: AttentionConfig, share: ContextShare | None) -> Tensor:
    """Rotary positions, int64 [tokens]. They count tokens that other ranks hold, too."""
    if share is None:
        return token_positions(layout, config)
    return share.take(token_positions(share.whole, config))
