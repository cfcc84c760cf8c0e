"""Attention by plain matrix products with an explicit log-sum-exp: any device, any dtype.

It keeps the whole score matrix of a batch, so it is for checking, for unusual shapes and dtypes,
and for small problems.
"""

import torch
from torch import Tensor

from megatron_dattn.attention.backends.dense import DenseBackend, DenseScores


class MathBackend(DenseBackend):
    name = "math"

    def unsupported(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        softcap: float | None = None,
    ) -> str | None:
        return None

    def dense_forward(
        self, query: Tensor, key: Tensor, value: Tensor, scores: DenseScores
    ) -> tuple[Tensor, Tensor]:
        values, _ = _scores(query, key, scores)
        lse = torch.logsumexp(values, dim=-1)
        out = torch.matmul(torch.exp(values - lse.unsqueeze(-1)), value.unsqueeze(2))
        return out.flatten(1, 2), lse.flatten(1, 2)

    def dense_backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        scores: DenseScores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        def grouped(tokens: Tensor) -> Tensor:
            return tokens.unflatten(1, (key.shape[1], -1))

        values, slope = _scores(query, key, scores)
        probabilities = torch.exp(values - grouped(lse).unsqueeze(-1))
        grad_out, out, query = grouped(grad_out), grouped(out), grouped(query)
        grad_value = torch.matmul(probabilities.mT, grad_out).sum(2)
        grad_probabilities = torch.matmul(grad_out, value.unsqueeze(2).mT)
        # d softmax: dS = P * (dP - sum(P * dP)), and that sum over ALL keys is grad_out . out.
        centre = (grad_out * out).sum(-1, keepdim=True)
        grad_scores = probabilities * (grad_probabilities - centre) * slope
        grad_query = torch.matmul(grad_scores, key.unsqueeze(2)).flatten(1, 2)
        grad_key = torch.matmul(grad_scores.mT, query).sum(2)
        return grad_query, grad_key, grad_value


def _scores(query: Tensor, key: Tensor, scores: DenseScores) -> tuple[Tensor, Tensor | float]:
    """Scaled, capped and masked scores, [batch, key heads, group, query width, key width], and
    their derivative by the products of query and key."""
    scale, softcap = scores.function.scale, scores.function.softcap
    grouped = query.unflatten(1, (key.shape[1], -1))
    values = torch.matmul(grouped, key.unsqueeze(2).mT) * scale
    slope: Tensor | float = scale
    if softcap is not None:
        share = torch.tanh(values / softcap)
        values, slope = softcap * share, scale * (1 - share**2)
    if scores.bias is not None:
        values = values + scores.bias.unsqueeze(2)
    hidden = scores.hidden(values.shape[-1], values.device)
    if hidden is not None:
        values = values.masked_fill(hidden, -torch.inf)
    return values, slope
