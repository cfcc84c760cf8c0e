"""Seconds of a training step under a parallel layout, modelled: operations, bytes, messages, waits.

A sum of terms, none of them measured. Every kernel costs its operations or its bytes at an assumed
share of the data sheet (`hardware.py`), or the host's time to launch it; messages inside a layer
and between pipeline stages are waited for; what data-parallel ranks send is hidden behind the last
micro-batch's backward pass where `parallel.overlap_grad_reduce` is on. Not in it: loading data,
saves, validation, ranks that wait for a slower one, smaller efficiency of small products.
"""

import math
from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import cached_property

from megatron_dattn.attention.layers import LayerRule
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.planner.activations import FP32, PackSize, Setup
from megatron_dattn.planner.hardware import Cluster
from megatron_dattn.planner.parameters import attention_widths, rank_parameters
from megatron_dattn.planner.part_flops import (
    PartFlops,
    adapter,
    decoder,
    layer_tokens,
    product,
    vision_encoder,
)

# Kernels of one micro-batch, forward and backward, products and messages included, by
# benchmarks/device_counts.md. `dattn`'s; a preset without diagonal visual tokens has fewer.
_LAUNCHES_TRAINED_LAYER = 70
_LAUNCHES_FROZEN_LAYER = 47
_LAUNCHES_AGAIN = 25
"""Of a layer's forward pass, for full recomputation."""
_LAUNCHES_TRAINED_ENCODER_LAYER = 52
_LAUNCHES_FROZEN_ENCODER_LAYER = 18
_LAUNCHES_ENDS = 60
"""Embedding and adapter; as many for head and loss."""

_BYTES_PER_LOGIT = 24
"""Logits in BF16, their fp32 copy, the softmax and the gradient, each written and read."""
_BYTES_PER_GRADIENT = 10
"""A micro-batch's gradient, BF16, is read and added to the fp32 sum."""
_BYTES_PER_UPDATE = 30
"""Adam reads and writes three fp32 values, reads the gradient and writes a BF16 weight."""
_BUCKET = 40_000_000
"""megatron-core's gradients travel in buckets of so many parameters, or 10**6 per rank if more."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the slowest pipeline stage, by what they are spent on."""

    products: float = 0.0
    """Matrix products of decoder, adapter and head."""
    attention: float = 0.0
    encoder: float = 0.0
    """The vision encoder, whatever its kernels do."""
    memory_bound: float = 0.0
    """Norms, activations, residuals, logits; gradients that are added up."""
    launches: float = 0.0
    """What the host needs for launches beyond the device's time."""
    tensor_messages: float = 0.0
    pipeline_messages: float = 0.0
    bubble: float = 0.0
    """Of a pipeline that fills and drains."""
    data_messages: float = 0.0
    """Gradients and weights among data-parallel ranks, less what is hidden."""
    update: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.terms.values())

    @property
    def terms(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in TERMS}

    def __add__(self, other: "StepTime") -> "StepTime":
        return StepTime(*(getattr(self, name) + getattr(other, name) for name in TERMS))

    def times(self, factor: float) -> "StepTime":
        return StepTime(*(getattr(self, name) * factor for name in TERMS))

    @property
    def settled(self) -> "StepTime":
        """Launches that the host does while the device works cost nothing."""
        on_device = self.total - self.launches
        return replace(self, launches=max(0.0, self.launches - on_device))


TERMS = tuple(field.name for field in fields(StepTime))


@dataclass(frozen=True)
class StepModel:
    """What decides the time of a step."""

    config: ModelConfig
    parallel: ParallelConfig
    execution: ExecutionConfig
    layout: TokenLayout
    """A full pack."""
    trained: frozenset[str]
    data_parallel_size: int
    num_microbatches: int
    cluster: Cluster

    def step(self) -> StepTime:
        """The whole step; pipeline stages run one forward, one backward."""
        num_stages = self.parallel.pipeline_model_parallel_size
        stages = [self.micro_batch(stage) for stage in range(num_stages)]
        slowest = max(range(num_stages), key=lambda stage: stages[stage].total)
        others = sum(stages[stage].total for stage in range(num_stages) if stage != slowest)
        once = max(
            (self._once(stage, time) for stage, time in enumerate(stages)),
            key=lambda time: time.total,
        )
        return stages[slowest].times(self.num_microbatches) + StepTime(bubble=others) + once

    def micro_batch(self, stage: int) -> StepTime:
        """One micro-batch, forward and backward, on a rank of a pipeline stage."""
        is_first, is_last = stage == 0, stage == self.parallel.pipeline_model_parallel_size - 1
        first, end = self._layers(stage)
        time = self.decoder_layers(first, end)
        if is_first:
            time += self.entry()
        if is_last:
            time += self.head()
        added = sum(count for _, count in self._trained_parameters(stage))
        time += StepTime(
            memory_bound=self.cluster.memory(added * _BYTES_PER_GRADIENT),
            pipeline_messages=self._pipeline_messages(is_first, is_last),
        )
        return time.settled

    def decoder_layers(self, first: int, end: int) -> StepTime:
        """Decoder layers `first` to `end` - 1, counted from 0, with all their launches."""
        rules, window = self._setup.rules, self.config.language.window
        kinds = Counter((rules[number], window(number)) for number in range(first, end))
        layers = (self._layer(*kind).times(count) for kind, count in kinds.items())
        return sum(layers, StepTime())

    def _layer(self, rule: LayerRule, window: int | None) -> StepTime:
        tokens = layer_tokens(self.config, self.layout, rule, window, self.execution.savings)
        parts = decoder(self.config, [tokens], self.trained, self._recomputes)
        tensor = self._setup.tensor
        products = (parts["projections"] + parts["ffn"]).total / tensor
        trains = "language_model" in self.trained
        launches = _LAUNCHES_TRAINED_LAYER if trains else _LAUNCHES_FROZEN_LAYER
        present = self.layout.text_budget + self.layout.visual_budget * rule.sees_images
        return StepTime(
            products=self.cluster.products(products),
            attention=self.cluster.attention(parts["attention"].total / tensor),
            launches=self.cluster.launches(launches + self._recomputes * _LAUNCHES_AGAIN),
            memory_bound=self.cluster.memory(self._layer_bytes(present)),
            tensor_messages=self._layer_messages(present),
        )

    def entry(self) -> StepTime:
        """Encoder, adapter and embedding, in front of the first layer."""
        flops = adapter(self.config, self.config.preset, len(self.layout.images), self.trained)
        tokens = self.layout.num_tokens
        return (
            StepTime(
                products=self.cluster.products(flops.total / self._setup.tensor),
                tensor_messages=self._all_reduces(2, tokens) + self._encoder_messages(),
                launches=self.cluster.launches(_LAUNCHES_ENDS),
            )
            + self._encoder()
        )

    def head(self) -> StepTime:
        """Head and loss of the text tokens, behind the last layer."""
        language, text, tensor = self.config.language, self.layout.text_budget, self._setup.tensor
        forward = 2 * text * language.hidden_size * language.padded_vocab_size
        flops = product(forward, bool(self.trained), "language_model" in self.trained)
        logits = text * language.padded_vocab_size // tensor
        return StepTime(
            products=self.cluster.products(flops.total / tensor),
            memory_bound=self.cluster.memory(logits * _BYTES_PER_LOGIT),
            tensor_messages=self._all_reduces(2, text),
            launches=self.cluster.launches(_LAUNCHES_ENDS),
        )

    @cached_property
    def _setup(self) -> Setup:
        layout = self.layout
        pack = PackSize(layout.visual_budget, layout.text_budget, len(layout.images))
        return Setup(self.config, self.parallel, self.execution, pack, self.trained)

    @property
    def _recomputes(self) -> bool:
        return self.execution.recompute == "full"

    def _layers(self, stage: int) -> tuple[int, int]:
        num_layers = self.config.language.num_hidden_layers
        shares = self.parallel.layers_per_pipeline_stage(num_layers)
        first = sum(shares[:stage])
        return first, first + shares[stage]

    def _trained_parameters(self, stage: int) -> list[tuple[str, int]]:
        held = rank_parameters(self.config, self.parallel, self.execution, stage)
        return [(module, count) for module, count in held.items() if module in self.trained]

    def _layer_bytes(self, tokens: int) -> float:
        """Read and written around a layer's products, forward and backward.

        Forward, in values per token: two norms read and write d each, two sums read 2d and write d;
        the FFN's activation reads 2f and writes f; rotation reads and writes queries and keys.
        Backward it is twice that; recomputation, of norms and activations at least, once more.
        """
        language, setup = self.config.language, self._setup
        query, key_value = attention_widths(language)
        norms = 14 if language.has_post_norms else 10
        whole = norms * language.hidden_size * tokens / setup.token_ranks
        width = 3 * language.intermediate_size + 2 * (query + key_value)
        cut = width * tokens / setup.tensor
        passes = 3 + (self.execution.recompute != "none")
        return passes * setup.value * (whole + cut)

    def _layer_messages(self, tokens: int) -> float:
        """Two gatherings and two scatterings forward, as many backward: or all-reduces, which are
        one of each. What sequence parallelism gathers a third time is hidden behind products."""
        return self._all_reduces(4 + 2 * self._recomputes, tokens)

    def _all_reduces(self, count: int, tokens: int) -> float:
        """Of values [tokens, d] in a tensor-parallel group, two messages each."""
        ranks = self._setup.tensor
        sent = tokens * self.config.language.hidden_size * self._setup.value * (ranks - 1) / ranks
        return self.cluster.ring(2 * count * sent, ranks, calls=2 * count)

    def _encoder(self) -> StepTime:
        vision, tensor = self.config.vision, self._setup.tensor
        images, cut = len(self.layout.images), tensor
        if self.execution.encoder_tp_mode == "data":
            images, cut = math.ceil(images / tensor), 1
        trained = "vision_model" in self.trained
        flops: PartFlops = vision_encoder(vision, images, trained, self._recomputes)
        # As in a decoder layer, with both sides of a plain activation.
        values = 10 * vision.hidden_size + 2 * vision.intermediate_size / cut
        passes = 3 + self._recomputes if trained else 1
        read = passes * values * images * vision.num_places * vision.num_used_layers
        launches = _LAUNCHES_TRAINED_ENCODER_LAYER if trained else _LAUNCHES_FROZEN_ENCODER_LAYER
        return StepTime(
            encoder=self.cluster.products(flops.total / cut)
            + self.cluster.memory(read * self._setup.value),
            launches=self.cluster.launches(launches * vision.num_used_layers),
        )

    def _encoder_messages(self) -> float:
        """Under "weights" two all-reduces per layer and direction; else features once gathered."""
        vision, ranks = self.config.vision, self._setup.tensor
        patches = len(self.layout.images) * vision.num_places
        sent = patches * vision.hidden_size * self._setup.value * (ranks - 1) / ranks
        calls = 1.0
        if self.execution.encoder_tp_mode == "weights":
            calls = 4 * vision.num_used_layers * (1 + ("vision_model" in self.trained))
        return self.cluster.ring(calls * sent, ranks, calls=calls)

    def _pipeline_messages(self, is_first: bool, is_last: bool) -> float:
        """In 1F1B a stage exchanges output for gradient with each neighbour, both ways at once."""
        neighbours = (not is_first) + (not is_last)
        distance = self._setup.tensor * self.data_parallel_size
        return neighbours * self.cluster.send(self._setup.hidden(self.layout.num_tokens), distance)

    def _once(self, stage: int, micro_batch: StepTime) -> StepTime:
        """Once per step: gradients are reduced, weights updated and gathered."""
        counts = dict(self._trained_parameters(stage))
        updated, ranks = sum(counts.values()), self.data_parallel_size
        sharded = ranks if self.parallel.use_distributed_optimizer else 1
        tensor, encoder = self._setup.tensor, 0
        if self.execution.encoder_tp_mode == "data":
            encoder = counts.get("vision_model", 0) * FP32
        own_images = self.cluster.ring(2 * encoder * (tensor - 1) / tensor, tensor, calls=2)
        buckets = max(1, math.ceil(updated / max(_BUCKET, 10**6 * ranks)))
        share = (ranks - 1) / ranks

        def ring(bytes_each: int) -> float:
            sent = updated * bytes_each * share
            return self.cluster.ring(sent, ranks, tensor, calls=buckets)

        reduced, gathered = ring(FP32), ring(self._setup.value)
        if not self.parallel.use_distributed_optimizer:
            reduced, gathered = 2 * reduced, 0.0
        if self.parallel.overlap_grad_reduce:
            # All but the last bucket, behind a backward pass: two thirds of a micro-batch.
            hidden = min(reduced * (1 - 1 / buckets), micro_batch.total * 2 / 3)
            reduced -= hidden
        updates = updated * _BYTES_PER_UPDATE / sharded + 2 * FP32 * updated  # zeroed, and the norm
        return StepTime(
            tensor_messages=own_images,
            data_messages=reduced + gathered,
            update=self.cluster.memory(updates),
        )
