"""Parameters per module and rank, exact, from the configuration alone.

A test compares them with the built model.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_dattn.models.config import LanguageConfig, ModelConfig, VisionConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig


@dataclass(frozen=True)
class ParameterBlock:
    """Weights that stand together: how many are cut over tensor ranks, how many repeated."""

    module: str
    place: Literal["first", "layers", "last"]
    """On the first pipeline stage, in equal shares in the layers, or on the last of them."""
    sharded: int
    replicated: int


def parameter_blocks(config: ModelConfig) -> list[ParameterBlock]:
    """All weights of the model."""
    return [
        *_vision_blocks(config.vision),
        _adapter_block(config),
        _added_block(config),
        *_language_blocks(config),
    ]


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of vision_model, adapter and language_model; tied embeddings count once."""
    counts: dict[str, int] = {}
    for block in parameter_blocks(config):
        counts[block.module] = counts.get(block.module, 0) + block.sharded + block.replicated
    return counts


def rank_parameters(
    config: ModelConfig, parallel: ParallelConfig, execution: ExecutionConfig, pipeline_stage: int
) -> dict[str, int]:
    """Parameters per module that one rank of a pipeline stage holds."""
    tensor, last = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size - 1
    counts = dict.fromkeys(("vision_model", "adapter", "language_model"), 0)
    num_layers = config.language.num_hidden_layers
    layers_here = parallel.layers_per_pipeline_stage(num_layers)[pipeline_stage]
    for block in parameter_blocks(config):
        whole = block.module == "vision_model" and execution.encoder_tp_mode == "data"
        on_rank = block.sharded // (1 if whole else tensor) + block.replicated
        if block.place == "layers":
            counts[block.module] += on_rank // num_layers * layers_here
        elif pipeline_stage == (0 if block.place == "first" else last):
            counts[block.module] += on_rank
    if config.language.tie_word_embeddings and 0 < pipeline_stage == last:
        counts["language_model"] += _embedding_size(config.language) // tensor  # the head's copy
    return counts


def _vision_blocks(config: VisionConfig) -> list[ParameterBlock]:
    d, f = config.hidden_size, config.intermediate_size
    embeddings = 3 * config.patch_size**2 * d + config.num_places * d
    # SigLIP: the patch embedding's bias. CLIP: the class token, and a LayerNorm.
    embeddings += 3 * d if config.family == "clip" else d
    # q, k, v with biases, output weight; both FFN weights and the first one's bias.
    sharded = 3 * (d * d + d) + d * d + 2 * d * f + f
    replicated = 2 * 2 * d + 2 * d  # two LayerNorms; biases of the row-parallel layers
    layers = config.num_used_layers
    return [
        ParameterBlock("vision_model", "first", 0, embeddings),
        ParameterBlock("vision_model", "first", layers * sharded, layers * replicated),
    ]


def _adapter_block(config: ModelConfig) -> ParameterBlock:
    preset = config.preset
    if preset.visual.source == "reproject":
        return ParameterBlock("adapter", "first", 0, 0)
    outputs = config.language.hidden_size
    middle = config.adapter.hidden_size or outputs
    sharded, replicated = _projector(config.vision.hidden_size, middle, outputs)
    if config.adapter_norm not in ("before", "both"):
        replicated -= config.vision.hidden_size
    if config.adapter_norm in ("behind", "both"):
        replicated += outputs
    match config.visual_embedding:
        case "row_column":
            replicated += 2 * config.adapter.max_grid * outputs
        case "per_patch":
            replicated += config.num_places**2 * outputs
        case "fractional":
            layer = outputs * outputs + outputs
            replicated += 2 * 2 * layer + outputs  # two MLPs, the last norm
    return ParameterBlock("adapter", "first", sharded, replicated)


def _added_block(config: ModelConfig) -> ParameterBlock:
    """What the preset adds to every decoder layer; it counts as the adapter's."""
    preset, language = config.preset, config.language
    d, (query, key_value) = language.hidden_size, attention_widths(language)
    sharded = replicated = 0
    if preset.has_gate:
        sharded += language.num_attention_heads
    if preset.merge == "cascade":
        sharded += d * query + d * 2 * key_value + query * d
    if preset.visual.source == "reproject":
        cut, whole = _projector(config.vision.hidden_size, d, d)
        sharded, replicated = sharded + cut, replicated + whole
    layers = language.num_hidden_layers
    return ParameterBlock("adapter", "layers", layers * sharded, layers * replicated)


def _projector(inputs: int, middle: int, outputs: int) -> tuple[int, int]:
    """Parameters of a norm and two linear layers with biases: cut over tensor ranks, repeated."""
    sharded = inputs * middle + middle + middle * outputs
    return sharded, inputs + outputs  # the norm; the second layer's bias


def _embedding_size(config: LanguageConfig) -> int:
    return config.padded_vocab_size * config.hidden_size


def _language_blocks(config: ModelConfig) -> list[ParameterBlock]:
    language = config.language
    d, f, layers = language.hidden_size, language.intermediate_size, language.num_hidden_layers
    query, key_value = attention_widths(language)
    sharded = d * (query + 2 * key_value) + query * d + 3 * d * f
    sharded += (query + 2 * key_value) * language.has_qkv_bias
    norms = (
        4 if language.has_post_norms else 2
    ) * d + 2 * language.head_dim * language.has_qk_norms
    head = 0 if language.tie_word_embeddings else _embedding_size(language)
    return [
        ParameterBlock("language_model", "first", _embedding_size(language), 0),
        ParameterBlock("language_model", "layers", layers * sharded, layers * norms),
        ParameterBlock("language_model", "last", head, d),
    ]


def attention_widths(config: LanguageConfig) -> tuple[int, int]:
    """Values per token of the queries, and of the keys (or values)."""
    return (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
