"""RMSNorms and LayerNorm for the local (not Transformer Engine) path.

megatron-core's own wrapper around torch's norms refuses sequence parallelism.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor


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
        return self.weight * F.rms_norm(hidden_states, shape, None, self.eps)


class ZeroCentredRMSNorm(RMSNorm):
    """RMSNorm whose weight counts from one, with the numerics of Hugging Face's `Gemma2RMSNorm`.

    All of it is fp32 (fp64 for fp64 inputs), and the product is rounded to the input's dtype.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(config, hidden_size, eps)
        torch.nn.init.zeros_(self.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize the last dimension, [..., hidden_size] -> the same shape and dtype."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        weight = 1.0 + self.weight.to(dtype)
        normed = F.rms_norm(hidden_states.to(dtype), (self.hidden_size,), weight, self.eps)
        return normed.to(hidden_states.dtype)


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm, built as megatron-core's layer specs build a norm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
