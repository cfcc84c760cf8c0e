"""megatron-core's TransformerConfigs for the language model and for what stands before it.

The one place that translates our settings into megatron-core's. The vision encoder and the adapter
run under a config of their own: replicated tokens (no sequence parallelism), one pipeline stage, no
FP8, because they live on the first pipeline stage only and hand over whole images.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_dattn.models.config import LanguageConfig, VisionConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig


def _quick_gelu(states: Tensor) -> Tensor:
    return states * torch.sigmoid(1.702 * states)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
}
"""By Hugging Face's names."""

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def language_transformer_config(
    language: LanguageConfig, parallel: ParallelConfig, execution: ExecutionConfig
) -> TransformerConfig:
    """The decoder's config."""
    is_swiglu = language.hidden_activation == "silu"
    return TransformerConfig(
        num_layers=language.num_hidden_layers,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_key_value_heads,
        kv_channels=language.head_dim,
        ffn_hidden_size=language.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=language.rms_norm_eps,
        layernorm_zero_centered_gamma=language.zero_centred_norms,
        add_bias_linear=False,
        add_qkv_bias=language.has_qkv_bias,
        # Also tells `finalize_model_grads` to add up the gradients of these norms, which every
        # tensor-parallel rank has of its own heads.
        qk_layernorm=language.has_qk_norms,
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[language.hidden_activation],
        # megatron-core's fused gated activations have no tanh-GELU, which Gemma has.
        bias_activation_fusion=is_swiglu and torch.cuda.is_available(),
        init_method_std=language.initializer_range,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=_more_than_one(
            parallel.virtual_pipeline_model_parallel_size
        ),
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        sequence_parallel=parallel.sequence_parallel,
        fp8=None if execution.fp8 == "none" else execution.fp8,
        fp8_recipe=execution.fp8_recipe,
        **_common(parallel, execution),
    )


def vision_transformer_config(
    vision: VisionConfig, parallel: ParallelConfig, execution: ExecutionConfig
) -> TransformerConfig:
    """The vision encoder's config; the adapter's linear layers use it too.

    It speaks of one tensor-parallel rank where each has the whole encoder. How the adapter is cut
    its process group says.
    """
    if execution.encoder_tp_mode == "data":
        parallel = dataclasses.replace(
            parallel, tensor_model_parallel_size=1, sequence_parallel=False
        )
    return TransformerConfig(
        num_layers=vision.num_used_layers,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_attention_heads,
        ffn_hidden_size=vision.intermediate_size,
        normalization="LayerNorm",
        layernorm_epsilon=vision.layer_norm_eps,
        activation_func=ACTIVATIONS[vision.hidden_act],
        bias_activation_fusion=False,
        **_common(parallel, execution),
    )


def _more_than_one(size: int) -> int | None:
    """megatron-core's way to say that there is one."""
    return size if size > 1 else None


def _common(parallel: ParallelConfig, execution: ExecutionConfig) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    on_meta = torch.get_default_device().type == "meta"  # shapes only, for --dry-run
    dtype = _DTYPES[execution.precision]
    interleaved = parallel.virtual_pipeline_model_parallel_size > 1
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,  # of the hidden states that a pipeline stage allocates to receive
        # Its default waits for the whole device after each message, a remedy for older torch.
        "batch_p2p_sync": False,
        # Interleaved, a pipeline of two sends activations and gradients from the same rank to the
        # same rank in one batch, gradients first, and the other rank receives activations first:
        # they come in each other's place, without an error, as they have one shape.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "autocast_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        # Initialized on the host, a weight does not depend on how it is cut into shards.
        "use_cpu_initialization": on_meta or not on_gpu,
        "perform_initialization": not on_meta,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Both are torch.compile'd: worth it on a GPU, a C++ compiler run on a CPU.
        "bias_dropout_fusion": on_gpu,
        "masked_softmax_fusion": False,  # of megatron-core's own attention core, not used here
        "cuda_graph_scope": [],  # its default is deprecated and warns
        # Losses are sums; megatron-core divides by the labelled tokens of all ranks in
        # `finalize_model_grads`. A mean per micro-batch would weigh packs of few labels more.
        "calculate_per_token_loss": True,
        # Once sent, an output is but the root of its backward pass, which reads no values of it.
        # Interleaved, it may be on its way still: NCCL's streams keep the memory, gloo reads what
        # has been freed.
        "deallocate_pipeline_outputs": on_gpu or not interleaved,
        **_recompute(execution),
    }


def _recompute(execution: ExecutionConfig) -> dict[str, Any]:
    if execution.recompute == "none":
        return {}
    if execution.recompute == "selective":
        # What is selected is our decoder layer's own matter. megatron-core's layers, the vision
        # encoder's, recompute nothing: without Transformer Engine their norms cannot be.
        return {"recompute_granularity": "selective", "recompute_modules": []}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
