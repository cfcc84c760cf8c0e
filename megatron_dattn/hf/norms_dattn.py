"""The norms of decoder and adapter.

This file travels with the exported weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_dattn import DAttnConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm; statistics in fp32 (fp64 for fp64 tokens)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., hidden] -> the same shape and dtype."""
        return self.weight * F.rms_norm(tokens, self.weight.shape, None, self.eps)


class ZeroCentredRMSNorm(RMSNorm):
    """Gemma-2's: the weight counts from one, and all of it is fp32 (fp64 for fp64 tokens)."""

    def forward(self, tokens: Tensor) -> Tensor:
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        weight = 1.0 + self.weight.to(dtype)
        return F.rms_norm(tokens.to(dtype), weight.shape, weight, self.eps).to(tokens.dtype)


def decoder_norm(config: DAttnConfig) -> RMSNorm:
    """A norm of the language model."""
    text = config.text_config
    kind = ZeroCentredRMSNorm if config.is_gemma2 else RMSNorm
    return kind(text.hidden_size, text.rms_norm_eps)
