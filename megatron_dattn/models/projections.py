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
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
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
        local: normalized tokens of this rank, `[V_r | T_r]`, [tokens, 1, H], of the model's dtype,
            as all that follows.
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
    """A linear layer's product, [tokens, 1, ...] -> [tokens, 1, ...] of the same dtype, in
    generation.

    For a few tokens megatron-core's preparations (collectives, gradients) take longer than the
    product. Where there are none it is made directly.
    """
    megatron = isinstance(layer, ColumnParallelLinear | RowParallelLinear)
    if megatron and torch.is_inference_mode_enabled() and layer.tp_group.size() == 1:
        assert layer.bias is None, "decoder layers have no biases"
        return F.linear(tokens, layer.weight)
    out, _ = layer(tokens)
    return out


def gated_ffn(mlp: MLP, tokens: Tensor) -> Tensor:
    """megatron-core's gated FFN without biases, by `project`: [tokens, 1, H] -> the same shape and
    dtype."""
    gate, up = project(mlp.linear_fc1, tokens).chunk(2, dim=-1)
    return project(mlp.linear_fc2, mlp.activation_func(gate) * up)


def gated_activation(mlp: MLP, gate_up: Tensor) -> Tensor:
    """The middle of megatron-core's gated FFN without biases, as its forward pass has it:
    [tokens, 1, 2 * width] -> [tokens, 1, width]."""
    if mlp.config.bias_activation_fusion:
        return bias_swiglu_impl(gate_up, None)
    gate, up = gate_up.chunk(2, dim=-1)
    return mlp.activation_func(gate) * up


def fold_output_weight(weight: Tensor, num_groups: int, head_dim: int) -> Tensor:
    """W_o summed over the query heads of each group: [H, Hq * D] to [H, groups * D], same dtype."""
    return weight.unflatten(1, (num_groups, -1, head_dim)).sum(2).flatten(1)


class _ProjectTokens(torch.autograd.Function):
    """Gathers the tokens, multiplies, and gathers them again in the backward pass.

    There the messages travel while products are computed that do not need them: the tokens during
    the gradient of the input, and that gradient during the weight's, as in megatron-core's linear
    layers. Keeping the gathered tokens for it would undo the memory that sequence parallelism
    saves. Text tokens meet the whole weight as it lies; only for visual tokens are the key and
    value rows, a small part of it, copied together.
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
        # The weight's gradient alone reads the tokens: a frozen language model keeps none.
        ctx.save_for_backward(local if ctx.needs_input_grad[1] else None, weight)
        ctx.shards, ctx.heads = shards, (num_groups, head_dim)
        tokens = shards.all_gather(local)
        visual, text = tokens[: -shards.text], tokens[-shards.text :]
        mixed = (text @ weight.T).unflatten(1, (num_groups, -1, head_dim))
        query = mixed[:, :, :-2].flatten(1)
        key_value = query.new_empty(len(tokens), 2 * num_groups * head_dim)
        if len(visual):
            torch.mm(visual, _key_value_rows(weight, *ctx.heads).T, out=key_value[: len(visual)])
        of_text = key_value[-shards.text :].unflatten(1, (2, num_groups, head_dim))
        of_text.copy_(mixed[:, :, -2:].transpose(1, 2))
        return query, key_value

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_query: Tensor, grad_key_value: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        local, weight = ctx.saved_tensors
        shards: SequenceLayout = ctx.shards
        scattering, grad_weight = None, None
        if ctx.needs_input_grad[1]:  # not where the language model is frozen
            gathering = shards.start_all_gather(local)
        if ctx.needs_input_grad[0]:
            # Of this rank's heads; the sum over the ranks is the gradient.
            grad_visual = grad_key_value[: -shards.text] @ _key_value_rows(weight, *ctx.heads)
            grad_text = grad_query.T, grad_key_value[-shards.text :].T
            grad_mixed = _join_rows(*grad_text, *ctx.heads).T
            scattering = shards.start_reduce_scatter(grad_visual, grad_mixed @ weight)
        if ctx.needs_input_grad[1]:
            # Not by kinds of tokens: a sum of two products would be rounded twice.
            tokens = gathering.wait()
            grad_weight = _join_rows(
                grad_query.T @ tokens[-shards.text :], grad_key_value.T @ tokens, *ctx.heads
            )
        grad_local = None if scattering is None else scattering.wait()
        return grad_local, grad_weight, None, None, None


def _key_value_rows(weight: Tensor, num_groups: int, head_dim: int) -> Tensor:
    """Rows of the fused weight that make keys and then values, [2 * groups * head_dim, H]: a
    copy."""
    heads = weight.unflatten(0, (num_groups, -1, head_dim))
    return heads[:, -2:].transpose(0, 1).flatten(0, 2)


def _join_rows(query: Tensor, key_value: Tensor, num_groups: int, head_dim: int) -> Tensor:
    """Rows for queries and rows for keys and then values, [rows, N] each, in the order of the fused
    weight's, [groups * (queries + 2) * head_dim, N]."""
    queries = query.unflatten(0, (num_groups, -1, head_dim))
    keys_values = key_value.unflatten(0, (2, num_groups, head_dim)).transpose(0, 1)
    return torch.cat((queries, keys_values), dim=1).flatten(0, 2)
