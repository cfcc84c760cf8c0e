"""Attention as it is defined, for references of any length: a few tokens of scores at a time.

The engine's backend `math` keeps the scores of all pairs, which limits it to short inputs. This one
walks through each segment in blocks of query tokens, so its memory grows with the number of keys
alone, and its time, which nobody measures, with that of the pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dattn.attention.backends.base import ScoreFunction
from megatron_dattn.attention.plan.parts import Part

SCORES_AT_A_TIME = 2**24
"""Of all heads together; 128 MiB in float64."""


@dataclass(frozen=True)
class _Block:
    """Some query tokens of one segment and the keys that they may see."""

    queries: slice
    keys: slice
    first: int
    """Place of the first query token within its segment."""


class ExactBackend:
    """A `Backend` by plain products, exact in the dtype of its input."""

    name = "exact"

    def unsupported(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        softcap: float | None = None,
    ) -> str | None:
        return None if softcap is None else "softcaps are not written"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        part: Part,
        score_function: ScoreFunction,
    ) -> tuple[Tensor, Tensor]:
        """Output [Nq, Hq, D] and log-sum-exp [Nq, Hq], all of one dtype, as every backend's."""
        assert score_function.softcap is None
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:2])
        for block in _blocks(part, query.shape[1]):
            q, k, v = query[block.queries], key[block.keys], value[block.keys]
            scores = _scores(q, k, block, part) * score_function.scale
            lse[block.queries] = scores.logsumexp(-1).T
            out[block.queries] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), _repeat(v, q))
        return out, lse

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        part: Part,
        score_function: ScoreFunction,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query [Nq, Hq, D], key and value [Nk, Hk, D], all of one dtype."""
        assert score_function.softcap is None
        grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for block in _blocks(part, query.shape[1]):
            q, g, o = query[block.queries], grad_out[block.queries], out[block.queries]
            k, v = key[block.keys], value[block.keys]
            scores = _scores(q, k, block, part) * score_function.scale
            probabilities = torch.exp(scores - lse[block.queries].T.unsqueeze(-1))
            grad_probabilities = torch.einsum("qhd,khd->hqk", g, _repeat(v, q))
            centre = (g * o).sum(-1).T.unsqueeze(-1)
            grad_scores = probabilities * (grad_probabilities - centre) * score_function.scale
            grads[0][block.queries] += torch.einsum("hqk,khd->qhd", grad_scores, _repeat(k, q))
            of_keys = torch.einsum("hqk,qhd->khd", grad_scores, q)
            of_values = torch.einsum("hqk,qhd->khd", probabilities, g)
            grads[1][block.keys] += of_keys.unflatten(1, (k.shape[1], -1)).sum(2)
            grads[2][block.keys] += of_values.unflatten(1, (k.shape[1], -1)).sum(2)
        return grads


def _blocks(part: Part, num_heads: int) -> Iterator[_Block]:
    first_query = first_key = 0
    for queries, keys in zip(part.query_lengths, part.key_lengths, strict=True):
        step = max(1, SCORES_AT_A_TIME // (keys * num_heads))
        for first in range(0, queries, step):
            end = min(first + step, queries)
            seen = end if part.causal else keys
            yield _Block(
                slice(first_query + first, first_query + end),
                slice(first_key, first_key + seen),
                first,
            )
        first_query, first_key = first_query + queries, first_key + keys


def _scores(query: Tensor, key: Tensor, block: _Block, part: Part) -> Tensor:
    """Products of a block, [heads, queries, keys]; -inf where a query does not see a key."""
    products = torch.einsum("qhd,khd->hqk", query, _repeat(key, query))
    if not part.causal:
        return products
    places = torch.arange(block.first, block.first + len(query), device=query.device)
    keys = torch.arange(len(key), device=query.device)
    hidden = keys > places.unsqueeze(1)
    if part.window is not None:
        hidden |= keys <= places.unsqueeze(1) - part.window
    return products.masked_fill(hidden, -torch.inf)


def _repeat(tokens: Tensor, query: Tensor) -> Tensor:
    """Keys or values for every query head."""
    return tokens.repeat_interleave(query.shape[1] // tokens.shape[1], dim=1)
