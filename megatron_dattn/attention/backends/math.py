"""Attention by plain matrix products with an explicit log-sum-exp: any device, any dtype.

It keeps the whole score matrix of a batch, so it is for checking, for unusual shapes and dtypes,
and for small problems.
"""

import torch
from torch import Tensor

from megatron_dattn.attention.backends.dense import DenseBackend


class MathBackend(DenseBackend):
    name = "math"

    def unsupported(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None

    def dense_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        scores = _scores(query, key, bias, causal, scale)
        lse = torch.logsumexp(scores, dim=-1)
        out = torch.matmul(torch.exp(scores - lse.unsqueeze(-1)), value.unsqueeze(2))
        return out.flatten(1, 2), lse.flatten(1, 2)

    def dense_backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        bias: Tensor | None,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        def grouped(rows: Tensor) -> Tensor:
            return rows.unflatten(1, (key.shape[1], -1))

        scores = _scores(query, key, bias, causal, scale)
        probabilities = torch.exp(scores - grouped(lse).unsqueeze(-1))
        grad_out, out, query = grouped(grad_out), grouped(out), grouped(query)
        grad_value = torch.matmul(probabilities.mT, grad_out).sum(2)
        grad_probabilities = torch.matmul(grad_out, value.unsqueeze(2).mT)
        # d softmax: dS = P * (dP - sum(P * dP)), and that sum over ALL keys is grad_out . out.
        centre = (grad_out * out).sum(-1, keepdim=True)
        grad_scores = probabilities * (grad_probabilities - centre) * scale
        grad_query = torch.matmul(grad_scores, key.unsqueeze(2)).flatten(1, 2)
        grad_key = torch.matmul(grad_scores.mT, query).sum(2)
        return grad_query, grad_key, grad_value


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Scaled and masked scores, [batch, key heads, group, query width, key width]."""
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores = torch.matmul(grouped, key.unsqueeze(2).mT) * scale
    if bias is not None:
        scores = scores + bias.unsqueeze(2)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return scores
