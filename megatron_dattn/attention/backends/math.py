"""Attention by plain matrix products with an explicit log-sum-exp: any device, any dtype.

It keeps the whole score matrix of a batch, so it is for checking, for unusual shapes and dtypes,
and for small problems.
"""

import torch
from torch import Tensor

from megatron_dattn.attention.backends.dense import DenseBackend, ScoreRule, hidden_places


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
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        rule: ScoreRule,
    ) -> tuple[Tensor, Tensor]:
        scores, _ = _scores(query, key, bias, rule)
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
        rule: ScoreRule,
    ) -> tuple[Tensor, Tensor, Tensor]:
        def grouped(tokens: Tensor) -> Tensor:
            return tokens.unflatten(1, (key.shape[1], -1))

        scores, slope = _scores(query, key, bias, rule)
        probabilities = torch.exp(scores - grouped(lse).unsqueeze(-1))
        grad_out, out, query = grouped(grad_out), grouped(out), grouped(query)
        grad_value = torch.matmul(probabilities.mT, grad_out).sum(2)
        grad_probabilities = torch.matmul(grad_out, value.unsqueeze(2).mT)
        # d softmax: dS = P * (dP - sum(P * dP)), and that sum over ALL keys is grad_out . out.
        centre = (grad_out * out).sum(-1, keepdim=True)
        grad_scores = probabilities * (grad_probabilities - centre) * slope
        grad_query = torch.matmul(grad_scores, key.unsqueeze(2)).flatten(1, 2)
        grad_key = torch.matmul(grad_scores.mT, query).sum(2)
        return grad_query, grad_key, grad_value


def _scores(
    query: Tensor, key: Tensor, bias: Tensor | None, rule: ScoreRule
) -> tuple[Tensor, Tensor | float]:
    """Scaled, capped and masked scores, [batch, key heads, group, query width, key width], and
    their derivative by the products of query and key."""
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores = torch.matmul(grouped, key.unsqueeze(2).mT) * rule.scale
    slope: Tensor | float = rule.scale
    if rule.softcap is not None:
        share = torch.tanh(scores / rule.softcap)
        scores, slope = rule.softcap * share, rule.scale * (1 - share**2)
    if bias is not None:
        scores = scores + bias.unsqueeze(2)
    hidden = hidden_places(rule, scores.shape[-1], scores.device)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores, slope
