"""Transformer layers as megatron-core specs: the only place that chooses between implementations.

"transformer_engine" takes linear layers and norms from Transformer Engine (fused norms, FP8);
"local" takes them from megatron-core and from `norm.py` and runs anywhere. The attention cores are
ours either way. Checkpoints of the two are interchangeable: the local norms are stored under the
names that Transformer Engine's fused norm-and-linear layers use.
"""

import logging
from functools import cache
from typing import Literal

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_dattn.attention import AttentionConfig
from megatron_dattn.errors import ConfigError
from megatron_dattn.models.config import LanguageConfig
from megatron_dattn.models.decoder_layer import DecoderLayer
from megatron_dattn.models.decomposed_attention import DecomposedCore, DecomposedSelfAttention
from megatron_dattn.models.execution import ExactSavings, ExecutionConfig
from megatron_dattn.models.norm import LayerNorm, RMSNorm, ZeroCentredRMSNorm
from megatron_dattn.models.vision_encoder import BidirectionalCore
from megatron_dattn.runtime.engine_imports import TE_NORMS, fp8_failure, te_failure

logger = logging.getLogger(__name__)

Implementation = Literal["local", "transformer_engine"]


def resolve_implementation(execution: ExecutionConfig) -> Implementation:
    """The implementation to build for `execution.transformer_impl` and `execution.fp8`.

    Raises:
        ConfigError: Transformer Engine is needed but not installed, it or the device has no such
            FP8, or unknown names.
    """
    requested, fp8 = execution.transformer_impl, execution.fp8
    if requested not in ("auto", "local", "transformer_engine"):
        raise ConfigError(
            f"execution.transformer_impl '{requested}' is unknown; choose auto, local or "
            "transformer_engine"
        )
    failure = te_failure()
    if requested == "transformer_engine" and failure:
        raise ConfigError(
            "execution.transformer_impl is 'transformer_engine', but Transformer Engine cannot be "
            f"used: {failure}; install megatron_dattn[gpu] or choose 'local'"
        )
    use_te = requested != "local" and not failure
    if fp8 != "none" and not use_te:
        because = f" ({failure})" if failure else ""
        raise ConfigError(
            f"execution.fp8 '{fp8}' needs Transformer Engine{because}; install megatron_dattn[gpu] "
            "and set execution.transformer_impl to 'auto' or 'transformer_engine', or set "
            "execution.fp8 to 'none'"
        )
    if fp8 != "none":
        failure = fp8_failure(execution.fp8_recipe)
        if failure:
            raise ConfigError(
                f"execution.fp8 '{fp8}' cannot be used with execution.fp8_recipe "
                f"'{execution.fp8_recipe}': {failure}; choose another recipe, or set execution.fp8 "
                "to 'none'"
            )
    if requested == "auto" and failure and torch.cuda.is_available():
        _announce_local(failure)
    return "transformer_engine" if use_te else "local"


@cache  # every model asks
def _announce_local(failure: str) -> None:
    logger.info("no Transformer Engine: %s; execution.transformer_impl auto is 'local'", failure)


def language_block_spec(
    implementation: Implementation,
    num_layers: int,
    *,
    language: LanguageConfig,
    preset: AttentionConfig,
    savings: ExactSavings,
    feature_size: int,
) -> TransformerBlockSubmodules:
    """The decoder's layers of one pipeline stage, with decomposed attention, and its final norm."""
    # A partial FFN multiplies normalized tokens with a part of the weight, out of the module.
    fused_ffn = implementation == "transformer_engine" and preset.visual.ffn in (0.0, 1.0)
    norm = _rms_norm(implementation, language)
    head_norm = norm if language.has_qk_norms else None
    column, row = _linears(implementation)
    layers = [
        ModuleSpec(
            module=DecoderLayer,
            params={
                "preset": preset,
                "savings": savings,
                "feature_size": feature_size,
                "last_on_pipeline_stage": number == num_layers - 1,
                "post_norm": norm if language.has_post_norms else None,
            },
            submodules=TransformerLayerSubmodules(
                # Never fused: `projections.py` multiplies its tokens with parts of linear_qkv.
                input_layernorm=norm,
                self_attention=ModuleSpec(
                    module=DecomposedSelfAttention,
                    params={
                        "attn_mask_type": AttnMaskType.no_mask,
                        "preset": preset,
                        "savings": savings,
                    },
                    submodules=SelfAttentionSubmodules(
                        linear_qkv=column,
                        core_attention=DecomposedCore,
                        linear_proj=row,
                        q_layernorm=head_norm,
                        k_layernorm=head_norm,
                    ),
                ),
                # TransformerLayer builds both residual adds; our forward pass adds by itself, as
                # it must know which tokens have one.
                self_attn_bda=get_bias_dropout_add,
                pre_mlp_layernorm=IdentityOp if fused_ffn else norm,
                mlp=_mlp_spec(_te_norm_linear() if fused_ffn else column, row),
                mlp_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map=_norm_keys(attention=True, ffn=not fused_ffn),
            ),
        )
        for number in range(num_layers)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def vision_block_spec(
    implementation: Implementation, num_layers: int
) -> TransformerBlockSubmodules:
    """The vision encoder's layers; it has no final norm, its features leave in mid-encoder."""
    fused = implementation == "transformer_engine"
    norm = IdentityOp if fused else LayerNorm
    column, row = _linears(implementation)
    first = _te_norm_linear() if fused else column
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                # megatron-core's own local vision spec says causal here, which is a mistake; our
                # core does not read it, but what is written should be true.
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=first, core_attention=BidirectionalCore, linear_proj=row
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=_mlp_spec(first, row),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_norm_keys(attention=not fused, ffn=not fused),
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=None)


def _mlp_spec(first: type, second: type) -> ModuleSpec:
    return ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=first, linear_fc2=second))


def _norm_keys(*, attention: bool, ffn: bool) -> dict[str, str]:
    """Checkpoint names of norms that are modules of their own."""
    is_module = {"input_layernorm.": attention, "pre_mlp_layernorm.": ffn}
    return {apart: fused for fused, apart in TE_NORMS.items() if is_module[apart]}


def _linears(implementation: Implementation) -> tuple[type, type]:
    """Column- and row-parallel linear layers."""
    if implementation == "local":
        return ColumnParallelLinear, RowParallelLinear
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TERowParallelLinear,
    )

    return TEColumnParallelLinear, TERowParallelLinear


def _te_norm_linear() -> type:
    """A norm and a column-parallel linear layer in one."""
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear

    return TELayerNormColumnParallelLinear


def _rms_norm(implementation: Implementation, language: LanguageConfig) -> type:
    """Transformer Engine's reads from TransformerConfig whether weights count from one."""
    if implementation == "transformer_engine":
        return _te_norm()
    return ZeroCentredRMSNorm if language.zero_centred_norms else RMSNorm


def _te_norm() -> type:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
