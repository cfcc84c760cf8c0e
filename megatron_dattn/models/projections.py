"""Attention's projections with tokens of two kinds: what visual tokens do not need is not computed.

The weights are those of megatron-core's fused `linear_qkv` and `linear_proj`, so that checkpoints
do not depend on how they are used. Two exact savings:

- visual tokens that do not attend need no query: `project_queries_keys_values` multiplies them with
  the key and value rows of the fused weight alone;
- a diagonal token's output is `W_o` times its values, repeated for every query head of a group.
  That is the sum of W_o over the group times the values once: `fold_output_weight`.

Both read one weight twice. megatron-core's fused weight-gradient accumulation would lose one of the
two gradients without a word (its hook drops `param.grad` once the kernel has written `main_grad`);
it is off in our configs, and here the products are autograd's own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dattn.parallel.sequence import SequenceLayout


def project_queries_keys_values(
    local: Tensor, weight: Tensor, shards: SequenceLayout, num_groups: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of text tokens, keys and values of all tokens.

    Args:
        local: normalized tokens of this rank, `[V_r | T_r]`, [tokens, 1, H].
        weight: this rank's share of the fused weight, [groups * (queries + 2) * head_dim, H]; in
            every group stand its query heads, then its key, then its value.
        num_groups: key heads of this rank.

    Returns:
        Query [text tokens, query heads, head_dim]; key and value [all tokens, groups, head_dim].
    """
    query, key_value = _ProjectTokens.apply(local.squeeze(1), weight, shards, num_groups, head_dim)
    key, value = key_value.unflatten(1, (2, num_groups, head_dim)).unbind(1)
    return query.unflatten(1, (-1, head_dim)), key, value


def project(layer: Any, tokens: Tensor) -> Tensor:
    """A linear layer's product, [tokens, 1, ...] -> [tokens, 1, ...], in generation.

    For a few tokens megatron-core's preparations (collectives, gradients) take longer than the
    product. Where there are none it is made directly.
    """
    megatron = isinstance(layer, ColumnParallelLinear | RowParallelLinear)
    if megatron and torch.is_inference_mode_enabled() and layer.tp_group.size() == 1:
        return F.linear(tokens, layer.weight)
    out, _ = layer(tokens)
    return out


def gated_ffn(mlp: MLP, tokens: Tensor) -> Tensor:
    """megatron-core's gated FFN without biases, by `project`: [tokens, 1, H] -> the same shape."""
    gate, up = project(mlp.linear_fc1, tokens).chunk(2, dim=-1)
    return project(mlp.linear_fc2, mlp.activation_func(gate) * up)


def fold_output_weight(weight: Tensor, num_groups: int, head_dim: int) -> Tensor:
    """W_o summed over the query heads of each group: [H, Hq * D] to [H, groups * D]."""
    return weight.unflatten(1, (num_groups, -1, head_dim)).sum(2).flatten(1)


class _ProjectTokens(torch.autograd.Function):
    """Gathers the tokens, multiplies, and gathers them again in the backward pass.

    Keeping the gathered tokens for it would undo the memory that sequence parallelism saves.
    """

    @staticmethod
    def forward(
        ctx: Any,
        local: Tensor,
        weight: Tensor,
        shards: SequenceLayout,
        num_groups: int,
        head_dim: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(local, weight)
        ctx.shards, ctx.heads = shards, (num_groups, head_dim)
        tokens = shards.all_gather(local)
        # Rows of the two lie interleaved in the weight, so each is a copy.
        query_weight, key_value_weight = _parts(weight, num_groups, head_dim)
        return tokens[-shards.text :] @ query_weight.T, tokens @ key_value_weight.T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_query: Tensor, grad_key_value: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        local, weight = ctx.saved_tensors
        shards: SequenceLayout = ctx.shards
        query_weight, key_value_weight = _parts(weight, *ctx.heads)
        grad_local, grad_weight = None, None
        if ctx.needs_input_grad[0]:
            # Of this rank's heads; the sum over the ranks is the gradient.
            grad_tokens = grad_key_value @ key_value_weight
            grad_tokens[-shards.text :] += grad_query @ query_weight
            grad_local = shards.reduce_scatter(grad_tokens)
        if ctx.needs_input_grad[1]:  # not where the language model is frozen
            tokens = shards.all_gather(local)
            grad_weight = _join_parts(
                grad_query.T @ tokens[-shards.text :], grad_key_value.T @ tokens, weight, *ctx.heads
            )
        return grad_local, grad_weight, None, None, None


def _parts(weight: Tensor, num_groups: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Rows of the fused weight that make queries, and those that make keys and then values."""
    heads = weight.unflatten(0, (num_groups, -1, head_dim))
    key_value = heads[:, -2:].transpose(0, 1)
    return heads[:, :-2].flatten(0, 2), key_value.flatten(0, 2)


def _join_parts(
    query: Tensor, key_value: Tensor, weight: Tensor, num_groups: int, head_dim: int
) -> Tensor:
    """The inverse of `_parts`, shaped like `weight`."""
    joined = torch.empty_like(weight).unflatten(0, (num_groups, -1, head_dim))
    joined[:, :-2] = query.view(num_groups, -1, head_dim, weight.shape[1])
    joined[:, -2:] = key_value.view(2, num_groups, head_dim, weight.shape[1]).transpose(0, 1)
    return joined.flatten(0, 2)
