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
    local: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shards: SequenceLayout,
    num_groups: int,
    head_dim: int,
    num_diagonal: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries of text tokens, keys and values of all tokens; all of one dtype, the model's.

    Args:
        local: normalized tokens of this rank, `[V_r | T_r]`, [tokens, 1, H].
        weight: this rank's share of the fused weight, [groups * (queries + 2) * head_dim, H]; in
            every group stand its query heads, then its key, then its value.
        bias: this rank's share of the biases, [groups * (queries + 2) * head_dim]; None without.
        num_groups: key heads of this rank.
        num_diagonal: leading tokens whose output is their own value.

    Returns:
        Query [text tokens, query heads, head_dim]; key and value [all tokens, groups, head_dim];
        and the diagonal tokens' values once more, [num_diagonal, groups, head_dim].
    """
    sizes = (num_groups, -1, head_dim)
    heads, added = weight.unflatten(0, sizes), None if bias is None else bias.unflatten(0, sizes)
    outputs = _ProjectTokens.apply(local.squeeze(1), heads, added, shards, num_diagonal)
    assert isinstance(outputs, tuple)
    return outputs


def project(layer: Any, tokens: Tensor) -> Tensor:
    """A linear layer's product, [tokens, 1, ...] -> [tokens, 1, ...] of the same dtype, in
    generation.

    For a few tokens megatron-core's preparations (collectives, gradients) take longer than the
    product. Where there are none it is made directly.
    """
    megatron = isinstance(layer, ColumnParallelLinear | RowParallelLinear)
    if megatron and torch.is_inference_mode_enabled() and layer.tp_group.size() == 1:
        return F.linear(tokens, layer.weight, layer.bias)
    out, _ = layer(tokens)
    return out


def gated_ffn(mlp: MLP, tokens: Tensor) -> Tensor:
    """megatron-core's gated FFN without biases, by `project`: [tokens, 1, H] -> the same shape and
    dtype."""
    gate, up = project(mlp.linear_fc1, tokens).chunk(2, dim=-1)
    return project(mlp.linear_fc2, mlp.activation_func(gate) * up)


def gated_activation(mlp: MLP, gate_up: Tensor) -> Tensor:
    """The middle of megatron-core's gated FFN without biases, as its forward pass has it:
    [tokens, 1, 2 * width] -> [tokens, 1, width], same dtype."""
    if mlp.config.bias_activation_fusion:
        return bias_swiglu_impl(gate_up, None)
    if mlp.activation_func is F.silu:
        out = _GatedSilu.apply(gate_up)
        assert isinstance(out, Tensor)
        return out
    gate, up = gate_up.chunk(2, dim=-1)
    return mlp.activation_func(gate) * up


def fold_output_weight(weight: Tensor, num_groups: int, head_dim: int) -> Tensor:
    """W_o summed over the query heads of each group: [H, Hq * D] to [H, groups * D], same dtype."""
    return weight.unflatten(1, (num_groups, -1, head_dim)).sum(2).flatten(1)


class _GatedSilu(torch.autograd.Function):
    """silu(gate) * up, bit for bit as autograd has it, which keeps nothing but its input.

    megatron-core's FFN adds an offset of 0.0 to `up` where no kernel fuses the activation; autograd
    keeps that sum and the activated gate, and joins two gradients by a copy.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        of_gate, of_up = grad_gate_up.chunk(2, dim=-1)
        middle = F.silu(gate)
        torch.mul(grad, middle, out=of_up)
        torch.mul(grad, up, out=middle)
        torch.ops.aten.silu_backward.grad_input(middle, gate, grad_input=of_gate)
        return grad_gate_up


class _ProjectTokens(torch.autograd.Function):
    """Gathers the tokens, multiplies, and gathers them again in the backward pass.

    There the messages travel while products are computed that do not need them: the tokens during
    the gradient of the input, and that gradient during the weight's, as in megatron-core's linear
    layers. Keeping the gathered tokens for it would undo the memory that sequence parallelism
    saves. What is a slice of the weight's rows in every group is multiplied group by group, in one
    batched product, and its gradient is written where it belongs: no rows are copied together. Only
    the gradient of visual tokens is a sum over groups, for which their key and value rows, a small
    part of the weight, are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        local: Tensor,
        heads: Tensor,
        bias: Tensor | None,
        shards: SequenceLayout,
        num_diagonal: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # The weight's gradient alone reads the tokens: a frozen language model keeps none.
        ctx.save_for_backward(local if ctx.needs_input_grad[1] else None, heads)
        ctx.shards, ctx.num_diagonal = shards, num_diagonal
        ctx.set_materialize_grads(False)  # of diagonal values that nobody reads
        tokens = shards.all_gather(local)
        of_query, of_key_value = (None, None) if bias is None else (bias[:, :-2], bias[:, -2:])
        query = _product_by_group(tokens[-shards.text :], heads[:, :-2], of_query).flatten(1, 2)
        key, value = _product_by_group(tokens, heads[:, -2:], of_key_value).unbind(2)
        # A slice taken outside would have a backward pass of its own: zeros for all tokens, filled
        # in and added.
        return query, key, value, value[:num_diagonal]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, grad_own: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        local, heads = ctx.saved_tensors
        shards: SequenceLayout = ctx.shards
        scattering, grad_heads, grad_bias = None, None, None
        if ctx.needs_input_grad[1]:  # not where the language model is frozen
            gathering = shards.start_all_gather(local)
        grad_query = grad_query.unflatten(1, (len(heads), -1))
        grad_key_value = torch.stack((grad_key, grad_value), dim=2)
        if grad_own is not None:
            grad_key_value[: ctx.num_diagonal, :, 1] += grad_own
        if ctx.needs_input_grad[0]:
            # Of this rank's heads; the sum over the ranks is the gradient.
            of_visual = grad_key_value[: -shards.text].flatten(1) @ heads[:, -2:].flatten(0, 2)
            mixed = torch.cat((grad_query, grad_key_value[-shards.text :]), dim=2)
            of_text = mixed.flatten(1) @ heads.flatten(0, 2)
            scattering = shards.start_reduce_scatter(of_visual, of_text)
        if ctx.needs_input_grad[1]:
            # Not by kinds of tokens: a sum of two products would be rounded twice.
            tokens = gathering.wait()
            grad_heads = torch.empty_like(heads)
            _add_up_by_group(grad_query, tokens[-shards.text :], grad_heads[:, :-2])
            _add_up_by_group(grad_key_value, tokens, grad_heads[:, -2:])
        if ctx.needs_input_grad[2]:
            grad_bias = torch.cat((grad_query.sum(0), grad_key_value.sum(0)), dim=1)
        grad_local = None if scattering is None else scattering.wait()
        return grad_local, grad_heads, grad_bias, None, None


def _product_by_group(tokens: Tensor, heads: Tensor, bias: Tensor | None) -> Tensor:
    """Products of [N, H] with some heads of every group, [groups, heads, D, H], plus their biases
    [groups, heads, D]: [N, groups, heads, D]."""
    groups, num_heads, head_dim, _ = heads.shape
    out = tokens.new_empty(len(tokens), groups, num_heads * head_dim)
    each, rows = tokens.expand(groups, -1, -1), heads.flatten(1, 2).mT
    if bias is None:
        torch.bmm(each, rows, out=out.transpose(0, 1))
    else:  # in one rounding
        torch.baddbmm(bias.flatten(1, 2).unsqueeze(1), each, rows, out=out.transpose(0, 1))
    return out.unflatten(2, (num_heads, head_dim))


def _add_up_by_group(grads: Tensor, tokens: Tensor, out: Tensor) -> None:
    """Gradients [N, groups, heads, D] times tokens [N, H], summed over the tokens, into those heads
    of the weight's gradient, [groups, heads, D, H]."""
    rows = grads.flatten(2).permute(1, 2, 0)
    torch.bmm(rows, tokens.expand(len(out), -1, -1), out=out.flatten(1, 2))
