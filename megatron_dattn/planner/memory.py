"""Bytes per rank while training, computed from the configuration alone.

Bytes of weights, gradients and optimizer state follow from the parameters (`parameters.py`).
Activation bytes are an estimate; `_decoder_layer_bytes` and its neighbours state the tensors they
count. Not counted: the CUDA context, communication buffers, the allocator's fragmentation and
short-lived workspaces (see `RESERVE_BYTES`).
"""

from dataclasses import dataclass

from megatron_dattn.attention import get_preset
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.planner.parameters import attention_widths, rank_parameters

RESERVE_BYTES = 4 * 10**9
"""Room to leave for what is not counted: context, NCCL, fragmentation. A rule of thumb."""

_VALUE_BYTES = {"bf16": 2, "fp32": 4}
# Per trained parameter. Gradients are accumulated in fp32; Adam keeps two fp32 moments, and BF16
# weights need an fp32 copy of themselves.
_GRADIENT_BYTES = 4
_OPTIMIZER_BYTES = {"bf16": 12, "fp32": 8}
_FP32 = 4


@dataclass(frozen=True)
class PackSize:
    """What of a micro-batch decides its activations."""

    visual_tokens: int
    text_tokens: int
    """Both with padding: the token budgets."""
    images: int


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank, by what they hold."""

    weights: int
    gradients: int
    optimizer: int
    decoder: int
    """Activations that the decoder layers keep for the backward pass."""
    vision: int
    """Pixels, and activations that the vision encoder and the adapter keep."""
    head: int
    """Logits and their gradient."""
    at_work: int
    """The layer whose backward pass (and recomputation) is running."""

    @property
    def total(self) -> int:
        states = self.weights + self.gradients + self.optimizer
        return states + self.decoder + self.vision + self.head + self.at_work


def rank_memory(
    config: ModelConfig,
    parallel: ParallelConfig,
    execution: ExecutionConfig,
    pack: PackSize,
    *,
    data_parallel_size: int,
    num_microbatches: int,
    trained: frozenset[str],
    stage: int = 0,
) -> RankMemory:
    """Bytes on a rank of a pipeline stage while it trains.

    Under pipeline parallelism (one forward, one backward) stage i keeps the activations of
    `stages - i` micro-batches.
    """
    held = rank_parameters(config, parallel, execution, stage)
    updated = sum(count for module, count in held.items() if module in trained)
    optimizer = updated * _OPTIMIZER_BYTES[execution.precision]
    if parallel.use_distributed_optimizer:
        optimizer //= data_parallel_size
    stages = parallel.pipeline_model_parallel_size
    in_flight = min(stages - stage, num_microbatches)
    first, last = stage == 0, stage == stages - 1
    layer = max(
        _decoder_layer_bytes(config, parallel, execution, pack),
        _vision_layer_bytes(config, parallel, execution, pack) if first else 0,
    )
    vision = _vision_bytes(config, parallel, execution, pack, trained) if first else 0
    return RankMemory(
        weights=sum(held.values()) * _VALUE_BYTES[execution.precision],
        gradients=updated * _GRADIENT_BYTES,
        optimizer=optimizer,
        decoder=in_flight * _decoder_bytes(config, parallel, execution, pack, stage),
        vision=in_flight * vision,
        head=_head_bytes(config, parallel, execution, pack) if last else 0,
        # Gradients of its activations; the activations too where they are recomputed.
        at_work=(2 if execution.recompute == "full" else 1) * layer
        + 2 * _ffn_chunk_bytes(config, parallel, execution, pack),
    )


def _decoder_bytes(
    config: ModelConfig,
    parallel: ParallelConfig,
    execution: ExecutionConfig,
    pack: PackSize,
    stage: int,
) -> int:
    """What the layers of one stage keep of one micro-batch."""
    layers = parallel.layers_per_stage(config.language.num_hidden_layers)[stage]
    if execution.recompute != "full":
        return layers * _decoder_layer_bytes(config, parallel, execution, pack)
    tokens = pack.visual_tokens + pack.text_tokens
    kept = tokens * config.language.hidden_size * _VALUE_BYTES[execution.precision]
    if parallel.sequence_parallel:
        kept //= parallel.tensor_model_parallel_size
    return layers * kept


def _decoder_layer_bytes(
    config: ModelConfig, parallel: ParallelConfig, execution: ExecutionConfig, pack: PackSize
) -> int:
    """What one decoder layer keeps for its backward pass, with fused norms and SwiGLU.

    Per token: inputs and outputs of both norms (4d; of four norms, 8d); key and value (2e); gate,
    up and their product (3f). Queries and outputs (q each) of the tokens that have them, scored
    tokens' log-sum-exps (one fp32 per head), and their merged output once more (q) where it is
    joined with visual tokens' for a common projection; the last two not if the attention core is
    recomputed. Where the FFN runs in recomputed chunks, neither its norm's output nor its middle is
    kept. Norm tensors are cut over tensor ranks under sequence parallelism only. The last layer,
    which keeps less of visual tokens it need not compute, is counted like the others.
    """
    language, value = config.language, _VALUE_BYTES[execution.precision]
    preset, savings = get_preset(config.attention), execution.savings
    tensor = parallel.tensor_model_parallel_size
    query, key_value = attention_widths(language)
    tokens = pack.visual_tokens + pack.text_tokens
    scored = tokens if preset.scores_visual_tokens else pack.text_tokens
    queries = scored if savings.visual_queries else tokens
    joined = preset.v2v == "diagonal" and not savings.folded_output
    kept = 8 if language.has_post_norms else 4
    if savings.ffn_chunk_tokens:  # the input of the chunk stays, what the FFN block made of it goes
        kept -= kept // 2 - 1
    norms = kept * language.hidden_size * value * tokens
    if parallel.sequence_parallel:
        norms //= tensor
    cut = queries * query + tokens * 2 * key_value + (tokens if joined else scored) * query
    if not savings.ffn_chunk_tokens:
        cut += tokens * 3 * language.intermediate_size
    cut *= value
    if execution.recompute != "selective":
        cut += scored * query * value if joined else 0
        cut += scored * language.num_attention_heads * _FP32
    return norms + cut // tensor


def _ffn_chunk_bytes(
    config: ModelConfig, parallel: ParallelConfig, execution: ExecutionConfig, pack: PackSize
) -> int:
    """What the FFN's chunk at work keeps for its own backward pass; 0 without chunks."""
    tokens = min(execution.savings.ffn_chunk_tokens, pack.visual_tokens + pack.text_tokens)
    per_token = config.language.hidden_size + 3 * config.language.intermediate_size
    bytes_per_value = _VALUE_BYTES[execution.precision]
    return tokens * per_token * bytes_per_value // parallel.tensor_model_parallel_size


def _vision_layer_bytes(
    config: ModelConfig, parallel: ParallelConfig, execution: ExecutionConfig, pack: PackSize
) -> int:
    """Per patch: inputs and outputs of both norms (4d); q, k, v and output (4d); both FFN sides."""
    vision, tensor = config.vision, parallel.tensor_model_parallel_size
    d, f = vision.hidden_size, vision.intermediate_size
    patches = _encoded_patches(config, parallel, execution, pack)
    if execution.encoder_tp_mode == "data":
        tensor = 1
    return patches * _VALUE_BYTES[execution.precision] * (4 * d + (4 * d + 2 * f) // tensor)


def _encoded_patches(
    config: ModelConfig, parallel: ParallelConfig, execution: ExecutionConfig, pack: PackSize
) -> int:
    """Patches that one rank encodes."""
    ranks = parallel.tensor_model_parallel_size if execution.encoder_tp_mode == "data" else 1
    return -(-pack.images // ranks) * config.vision.num_places


def _vision_bytes(
    config: ModelConfig,
    parallel: ParallelConfig,
    execution: ExecutionConfig,
    pack: PackSize,
    trained: frozenset[str],
) -> int:
    """Pixels, the encoder's layers (none when frozen), the adapter.

    The adapter keeps its input, both sides of its GELU, and of every norm what it reads beside what
    it gives; its output joins the decoder's tokens. Without an adapter, the features do.
    """
    vision, value = config.vision, _VALUE_BYTES[execution.precision]
    patches = _encoded_patches(config, parallel, execution, pack)
    per_layer = 0
    if "vision_model" in trained and execution.recompute == "full":
        per_layer = patches * value * vision.hidden_size
    elif "vision_model" in trained:
        per_layer = _vision_layer_bytes(config, parallel, execution, pack)
    per_token = config.language.hidden_size
    if get_preset(config.attention).visual.source != "reproject":
        middle = config.adapter.hidden_size or config.language.hidden_size
        per_token += vision.hidden_size + 2 * middle // parallel.tensor_model_parallel_size
        before, behind = (config.adapter_norm in (place, "both") for place in ("before", "behind"))
        norms_behind = behind + (config.visual_embedding == "fractional")
        per_token += before * vision.hidden_size + norms_behind * config.language.hidden_size
    adapter = pack.images * config.tokens_per_image * value * per_token
    pixels = pack.images * 3 * vision.image_size**2 * _FP32
    return pixels + vision.num_used_layers * per_layer + adapter


def _head_bytes(
    config: ModelConfig, parallel: ParallelConfig, execution: ExecutionConfig, pack: PackSize
) -> int:
    """Logits, their fp32 softmax and its gradient, if every text token had a label."""
    per_logit = 2 * _VALUE_BYTES[execution.precision] + 2 * _FP32
    vocabulary = config.language.padded_vocab_size // parallel.tensor_model_parallel_size
    return pack.text_tokens * vocabulary * per_logit
