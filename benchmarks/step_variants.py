"""Whole training steps of the demo's model: the engine's own, and one written without it."""

import itertools

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from benchmarks.agreement import copy_weights as copy_layers
from benchmarks.plain_vlm import PlainVLM
from megatron_dattn.batch import IGNORED_LABEL, PackedBatch
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.config.training import (
    LoggingConfig,
    ModuleLearningRates,
    OptimizerConfig,
    TrainingConfig,
)
from megatron_dattn.conversion.families.weight_map import GroupedQKV
from megatron_dattn.data.config import DataConfig
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.execution import ExactSavings, ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.runtime.distributed import get_device, seed_everything
from megatron_dattn.training.metrics import Metrics, StepReport
from megatron_dattn.training.run import Run, build_state
from megatron_dattn.training.stages import build_training_model
from megatron_dattn.training.step import train_step
from megatron_dattn.training.stream import BatchStream

RATE = 1e-4
TRAIN_ITERS = 10**6  # more than any benchmark runs: the schedule never ends
# Losses of a step are means of sums in another order, of values with 24 bits or 8.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
COMPARED_STEPS = 3


REFERENCE = ExecutionConfig(
    precision="fp32",
    recompute="none",
    transformer_impl="local",
    attention_backend="math",
    savings=ExactSavings(
        visual_queries=False, folded_output=False, unread_tokens=False, labelled_logits=False
    ),
)
"""Nothing left out, nothing repeated, scores in memory: what losses are compared with."""


def pretrain_config(
    model: ModelConfig, batch: PackedBatch, execution: ExecutionConfig
) -> PretrainConfig:
    """A run of the model in which every module trains, on that batch alone."""
    layout = batch.layout
    rates = ModuleLearningRates(vision_model=RATE, adapter=RATE, language_model=RATE)
    return PretrainConfig(
        model=model,
        parallel=ParallelConfig(),
        data=DataConfig(visual_budget=layout.visual_budget, text_budget=layout.text_budget),
        optimizer=OptimizerConfig(learning_rates=rates, warmup_ratio=0.0),
        training=TrainingConfig(
            train_iters=TRAIN_ITERS,
            micro_batch_size=layout.num_samples,
            global_batch_size=layout.num_samples,
        ),
        execution=execution,
    )


class EngineVariant:
    """The training engine's own step, on the same batch every time. Groups must exist."""

    def __init__(self, config: PretrainConfig, batch: PackedBatch) -> None:
        seed_everything(config.training.seed)
        chunks = build_training_model(config)
        self.model = unwrap_model(chunks[0])
        self.run = Run(
            config=config,
            state=build_state(config, chunks),
            stream=BatchStream(itertools.repeat(batch), get_device()),
            metrics=Metrics(
                LoggingConfig(),
                stage="",
                train_iters=1,
                first_step=0,
                world_size=1,
                peak_flops=None,
            ),
        )

    def step(self) -> StepReport:
        return train_step(self.run)

    def first_losses(self) -> list[float]:
        """Of the steps that are compared; the weights move on."""
        return [self.step().loss for _ in range(COMPARED_STEPS)]


class PlainVariant:
    """A hand-written loop: zero_grad, forward, backward, clip, fused AdamW."""

    def __init__(self, engine: EngineVariant, batch: PackedBatch) -> None:
        self.model = PlainVLM(engine.run.config.model).to(get_device())
        copy_weights(engine.model, self.model, engine.run.config.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, fused=True)
        self.batch = tuple(tensor.to(get_device()) for tensor in padded(batch))

    def step(self) -> float:
        """The loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(*self.batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def first_losses(self) -> list[float]:
        """As `EngineVariant.first_losses`."""
        return [self.step() for _ in range(COMPARED_STEPS)]


def reference_of(engine: EngineVariant, batch: PackedBatch) -> EngineVariant:
    """The same preset and weights, run as `REFERENCE` says."""
    config = pretrain_config(engine.run.config.model, batch, REFERENCE)
    reference = EngineVariant(config, batch)
    copy_layers(engine.model, reference.model)
    return reference


def distance(ours: list[float], theirs: list[float], precision: str, names: str) -> float:
    """The largest relative difference of two variants' losses.

    Raises:
        RuntimeError: it is more than the precision explains, so the two do not do the same work.
    """
    found = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    if found > LOSS_TOLERANCE[precision]:
        raise RuntimeError(f"{names}: the first losses are {ours} and {theirs}")
    return found


def padded(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, ids and labels, int64 [B, T] each, padded to the longest text."""
    lengths = list(batch.layout.text_lengths)
    used = sum(lengths)
    ids = nn.utils.rnn.pad_sequence(list(batch.input_ids[:used].split(lengths)), True)
    labels = list(batch.labels[:used].split(lengths))
    return batch.pixel_values, ids, nn.utils.rnn.pad_sequence(labels, True, IGNORED_LABEL)


_LAYER_NAMES = {
    "norm1": "input_layernorm",
    "norm2": "pre_mlp_layernorm",
    "qkv": "self_attention.linear_qkv",
    "out": "self_attention.linear_proj",
    "up": "mlp.linear_fc1",
    "down": "mlp.linear_fc2",
}


@torch.no_grad()
def copy_weights(engine: nn.Module, plain: PlainVLM, sizes: ModelConfig) -> None:
    """Give the plain model the engine's weights."""
    source = dict(engine.named_parameters())
    language = sizes.language
    qkv = GroupedQKV(language.num_attention_heads, language.num_key_value_heads, language.head_dim)
    pairs: dict[str, Tensor] = {
        "patches.weight": source["vision_model.patch_embedding.weight"],
        "patches.bias": source["vision_model.patch_embedding.bias"],
        "positions": source["vision_model.position_embedding"],
        "adapter.0.weight": source["adapter.norm.weight"],
        "rows": source["adapter.positions.rows"],
        "columns": source["adapter.positions.columns"],
        "embedding.weight": source["language_model.embedding.word_embeddings.weight"],
        "norm.weight": source["language_model.decoder.final_layernorm.weight"],
        "head.weight": source["language_model.output_layer.weight"],
    }
    for kind in ("weight", "bias"):
        pairs[f"adapter.1.{kind}"] = source[f"adapter.linear_fc1.{kind}"]
        pairs[f"adapter.3.{kind}"] = source[f"adapter.linear_fc2.{kind}"]
        for n in range(sizes.vision.num_used_layers):
            layer = f"vision_model.encoder.layers.{n}"
            for ours, theirs in _LAYER_NAMES.items():
                pairs[f"vision.{n}.{ours}.{kind}"] = source[f"{layer}.{theirs}.{kind}"]
    for n in range(language.num_hidden_layers):
        layer = f"language_model.decoder.layers.{n}"
        q, k, v = qkv.split(source[f"{layer}.self_attention.linear_qkv.weight"])
        pairs[f"layers.{n}.q.weight"] = q
        pairs[f"layers.{n}.kv.weight"] = torch.cat((k, v))
        for ours, theirs in _LAYER_NAMES.items():
            if ours != "qkv":
                name = {"up": "gate_up"}.get(ours, ours)
                pairs[f"layers.{n}.{name}.weight"] = source[f"{layer}.{theirs}.weight"]
    plain.load_state_dict(pairs)
