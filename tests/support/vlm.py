"""A tiny vision-language model and packed batches for it, the same on every rank and layout."""

import zlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.batch import PackedBatch
from megatron_dattn.conversion.families.registry import language_rules, vision_rules
from megatron_dattn.conversion.families.weight_map import Rule
from megatron_dattn.models.build import build_model
from megatron_dattn.models.config import AdapterConfig, LanguageConfig, ModelConfig, VisionConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.models.vlm import DAttnVLM
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.runtime.engine_imports import TE_NORMS
from tests.support.megatron import global_parameters

# 44 pixels hold three patches of 14 and two pixels more, which must be ignored.
VISION = VisionConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=48,
    image_size=44,
    patch_size=14,
)
LANGUAGE = LanguageConfig(
    hidden_size=40,  # unlike num_attention_heads * head_dim
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=56,
    vocab_size=64,
    rope_theta=10_000.0,
)
MORE_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
CLIP = replace(VISION, family="clip", hidden_act="quick_gelu", layer_norm_eps=1e-5)
# What makes the tiny decoder one of another family. The cap is so low and the window so short that
# both matter; 7 is neither head_dim nor a square; 65 tokens are padded to 128.
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {},
    "llama": {"family": "llama"},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
    "gemma2": {
        "family": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
        "sliding_window": 5,
        "rms_norm_eps": 1e-6,
        "vocab_size": 65,
    },
}
NO_IMAGES: tuple[tuple[int, ...], ...] = ()


def tiny_model_config(
    attention: str = "dattn", *, vision: VisionConfig = VISION, **language: Any
) -> ModelConfig:
    """All sizes divisible by two, none equal to another by accident.

    Where a preset reads images in a share of the key heads, that share is less than all of them.
    """
    heads = MORE_HEADS if PRESETS[attention].visual.heads < 1.0 else {}
    family = FAMILIES[language.get("family", "mistral")]
    sizes = {**LANGUAGE.__dict__, **heads, **family, **language}
    adapter = AdapterConfig(max_grid=4)
    return ModelConfig(vision, adapter, LanguageConfig(**sizes), attention)


def even_model_config() -> ModelConfig:
    """Round sizes, and images of 4 x 4 patches: for sums that a test does by hand."""
    vision = replace(VISION, num_attention_heads=4, image_size=28, patch_size=7)
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 96}
    config = tiny_model_config(vision=vision, vocab_size=128, **sizes)
    return replace(config, adapter=AdapterConfig(max_grid=8))


def tiny_model(
    config: ModelConfig | None = None,
    *,
    parallel: ParallelConfig | None = None,
    **execution: Any,
) -> DAttnVLM:
    """This rank's stage of a tiny fp32 model; weights are the same under every layout."""
    config, parallel = config or tiny_model_config(), parallel or ParallelConfig()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    stages = parallel.pipeline_model_parallel_size
    model = build_model(
        config,
        parallel,
        ExecutionConfig(**{"precision": "fp32", **execution}),
        pre_process=stage == 0,
        post_process=stage == stages - 1,
    )
    layers = parallel.layers_per_pipeline_stage(config.language.num_hidden_layers)
    zero_centred = config.language.zero_centred_norms
    fill_parameters(model, sum(layers[:stage]), zero_centred_norms=zero_centred)
    return model


def join_tokens(model: DAttnVLM, batch: PackedBatch) -> Tensor:
    """What enters the decoder on the first stage, [tokens, 1, H]."""
    attention = model.attention_inputs(batch.layout, batch.input_ids.device)
    return model.join_tokens(model.adapt(model.encode(batch.pixel_values)), batch, attention)


@torch.no_grad()
def fill_parameters(
    model: DAttnVLM, layer_offset: int = 0, *, zero_centred_norms: bool = False
) -> None:
    """Random values that depend on a parameter's name and global shape only.

    Nothing keeps a special value: norm weights vary around 1 (a decoder's zero-centred ones around
    0), positions and biases around 0.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for name, param in global_parameters(model, layer_offset):
        axis, stride = partition_of(param)
        shape = list(param.shape)
        if axis is not None:
            shape[axis] *= size
        if model.share_embeddings_and_output_weights:  # the last stage's copy of the embedding
            name = name.replace("output_layer", "embedding.word_embeddings")
        for fused, own in TE_NORMS.items():
            name = name.replace(fused, own)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        full = torch.randn(shape, generator=generator) * 0.1
        zero_centred = zero_centred_norms and "decoder" in name
        if "norm" in name and name.endswith("weight") and not zero_centred:
            full += 1.0
        if axis is not None:
            strides = full.unflatten(axis, (stride, -1)).chunk(size, axis + 1)
            full = strides[rank].flatten(axis, axis + 1)
        param.copy_(full)


def partition_of(param: Tensor) -> tuple[int | None, int]:
    """The axis along which a parameter is cut over tensor-parallel ranks, if any, and its stride.

    A gated MLP's first layer has stride 2: every rank holds a share of [gate; up] each.
    """
    if not getattr(param, "tensor_model_parallel", False):
        return None, 1
    return param.partition_dim, param.partition_stride  # type: ignore[attr-defined]


def join_shards(shards: Sequence[Tensor], axis: int | None, stride: int) -> Tensor:
    """One rank's shards back to the whole; replicated tensors must agree bit for bit."""
    if axis is None:
        assert all(torch.equal(shard, shards[0]) for shard in shards)
        return shards[0]
    parts = [shard.unflatten(axis, (stride, -1)) for shard in shards]
    return torch.cat(parts, axis + 1).flatten(axis, axis + 1)


def make_batch(
    texts: Sequence[int],
    images: Sequence[Sequence[int]] = NO_IMAGES,
    *,
    unlabelled: bool = False,
    budgets: tuple[int, int] = (36, 32),
    seed: int = 0,
    first_sample: int = 0,
    grid: tuple[int, int] = VISION.grid,
) -> PackedBatch:
    """A pack of random samples.

    Args:
        texts: text tokens per sample.
        images: per sample, how many of its text tokens stand before each of its images.
        unlabelled: supervise nothing; else about two of three tokens, the last of a sample never.
        budgets: visual and text tokens.
        first_sample: contents depend on `seed` and the number of the sample, counted from here.
        grid: of an image's tokens in the decoder (`ModelConfig.image_grid`).
    """
    images = [*images, *[()] * (len(texts) - len(images))]
    spans = tuple(
        ImageSpan(sample, offset, grid)
        for sample, offsets in enumerate(images)
        for offset in offsets
    )
    input_ids = torch.zeros(budgets[1], dtype=torch.int64)
    labels = torch.full((budgets[1],), -100)
    pixels, prompts = [], []
    ends = list(accumulate(texts))
    for sample, (length, offsets) in enumerate(zip(texts, images, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + first_sample + sample)
        ids = torch.randint(0, LANGUAGE.vocab_size, (length,), generator=generator)
        start, end = ends[sample] - length, ends[sample]
        input_ids[start:end] = ids
        if not unlabelled:
            supervised = torch.rand(length - 1, generator=generator) < 0.67
            labels[start : end - 1] = torch.where(supervised, ids[1:], -100)
        labelled = (labels[start:end] != -100).nonzero().flatten().tolist()
        prompts.append(labelled[0] + 1 if labelled else length)
        pixels.append(torch.randn(len(offsets), 3, 44, 44, generator=generator))
    layout = TokenLayout(tuple(texts), spans, *budgets, tuple(prompts))
    keys = [f"{seed}/{first_sample + sample}" for sample in range(len(texts))]
    return PackedBatch(layout, input_ids, labels, torch.cat(pixels), keys)


@torch.no_grad()
def load_hugging_face(
    model: DAttnVLM, *, vision: dict[str, Tensor] | None = None, text: dict[str, Tensor]
) -> None:
    """Copy state dicts of a `SiglipVisionModel` and a `MistralForCausalLM` into our model."""
    config = model.model_config
    _load(model.language_model, language_rules(config.language), text)
    if vision is not None:
        assert model.vision_model is not None
        _load(model.vision_model, vision_rules(config.vision), vision)


def _load(module: torch.nn.Module, rules: list[Rule], weights: dict[str, Tensor]) -> None:
    ours = dict(module.named_parameters())
    for rule in rules:
        ours.pop(rule.megatron).copy_(rule.layout.join([weights[name] for name in rule.sources]))
    assert not ours, f"no weights for {list(ours)}"
