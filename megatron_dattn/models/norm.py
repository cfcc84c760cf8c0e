"""RMSNorms and LayerNorm for the local (not Transformer Engine) path.

megatron-core's own wrapper around torch's norms refuses sequence parallelism.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm with the numerics of Hugging Face's `MistralRMSNorm`.

    The statistics are taken in fp32 (fp64 for fp64 inputs); the normalized token is rounded to the
    input's dtype before the weight is applied, but on CUDA, where one kernel does it all in fp32
    and keeps nothing in between for the backward pass.

    Args:
        config: gives the parameters' dtype and whether tokens are sharded over the ranks.
        hidden_size: length of a token.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism every rank normalizes other tokens, so each has a part of the
        # weight's gradient. This mark makes megatron-core's `finalize_model_grads` add them up.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize the last dimension, [..., hidden_size] -> the same shape and dtype."""
        shape = (self.hidden_size,)
        if hidden_states.is_cuda:
            return F.rms_norm(hidden_states, shape, self.weight, self.eps)
        if hidden_states.dtype != torch.bfloat16:
            return self.weight * F.rms_norm(hidden_states, shape, None, self.eps)
        out = _NormOfHalfPrecision.apply(hidden_states, self.weight, self.eps)
        assert isinstance(out, Tensor)
        return out


class _NormOfHalfPrecision(torch.autograd.Function):
    """weight * F.rms_norm(tokens), bit for bit as autograd has it on the host.

    There torch has no kernel for it, and of the chain of operations autograd keeps the fp32 tokens
    and what is normalized. This keeps the tokens, and works in place. In fp32 it would add up the
    gradients of tokens and residual in another order than autograd.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = tokens.to(_norm_dtype(tokens))
        inverse = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(tokens, inverse, weight)
        return weight * (wide * inverse).to(tokens.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        tokens, inverse, weight = ctx.saved_tensors
        wide = tokens.to(inverse.dtype)
        product = wide * inverse
        grad_weight = None
        if ctx.needs_input_grad[1]:
            normed = product.to(tokens.dtype)
            grad_weight = (normed * grad).sum(tuple(range(grad.dim() - 1)))
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        scaled = (grad * weight).to(wide.dtype)
        of_inverse = torch.mul(scaled, wide, out=product).sum(-1, keepdim=True)
        # Of the mean of squares, spread over the token: its derivative by a value v is 2v / size.
        of_mean = (-0.5 * of_inverse) * inverse.pow(3) / tokens.shape[-1]
        grad_tokens = scaled.mul_(inverse).add_(torch.mul(wide, 2.0 * of_mean, out=product))
        return grad_tokens.to(tokens.dtype), grad_weight, None


def _norm_dtype(tokens: Tensor) -> torch.dtype:
    return torch.promote_types(tokens.dtype, torch.float32)


class ZeroCentredRMSNorm(RMSNorm):
    """RMSNorm whose weight counts from one, with the numerics of Hugging Face's `Gemma2RMSNorm`.

    All of it is fp32 (fp64 for fp64 inputs), and the product is rounded to the input's dtype.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(config, hidden_size, eps)
        torch.nn.init.zeros_(self.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize the last dimension, [..., hidden_size] -> the same shape and dtype."""
        dtype = _norm_dtype(hidden_states)
        weight = 1.0 + self.weight.to(dtype)
        normed = F.rms_norm(hidden_states.to(dtype), (self.hidden_size,), weight, self.eps)
        return normed.to(hidden_states.dtype)


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm, built as megatron-core's layer specs build a norm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
