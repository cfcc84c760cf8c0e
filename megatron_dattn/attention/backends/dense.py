"""The common frame of backends whose kernel takes dense batches: pad, call, unpad.

Half precision is computed in float32, and only inputs and outputs are rounded, unless a backend's
kernel is better off with it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dattn.attention.backends.base import Backend, ScoreFunction
from megatron_dattn.attention.merge import merge_dtype
from megatron_dattn.attention.plan.padding import PaddedBatch, PaddedTokens
from megatron_dattn.attention.plan.parts import Part


@dataclass(frozen=True)
class DenseScores:
    """How the scores of a dense batch come about, and which of them count."""

    function: ScoreFunction
    bias: Tensor | None  # [batch, 1, 1, key width], added to the scores: -inf for padding, else 0
    causal: bool
    window: int | None  # in a causal batch: a query sees this many keys, itself included

    def hidden(self, width: int, device: torch.device) -> Tensor | None:
        """True where a causal batch's query (row) does not see a key (column), bool [width, width].

        None where there is no causal mask.
        """
        if not self.causal:
            return None
        hidden = torch.ones(width, width, dtype=torch.bool, device=device).triu(1)
        if self.window is not None and self.window < width:
            hidden |= torch.ones_like(hidden).tril(-self.window)
        return hidden


class DenseBackend(Backend, ABC):
    """Runs `dense_forward` and `dense_backward` over a part's padded batches.

    Dense tensors are [batch, heads, width, D], log-sum-exps [batch, heads, width].
    """

    def computing_dtype(self, dtype: torch.dtype, batch: PaddedBatch) -> torch.dtype:
        """The precision in which inputs of `dtype` reach the kernel."""
        return merge_dtype(dtype)

    def decoding_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The same for a forward pass of one query per head, over any number of keys."""
        return merge_dtype(dtype)

    @abstractmethod
    def dense_forward(
        self, query: Tensor, key: Tensor, value: Tensor, scores: DenseScores
    ) -> tuple[Tensor, Tensor]:
        """Output [batch, query heads, query width, D] and log-sum-exp [batch, query heads, query
        width]; key and value have key heads and key width. All of one dtype."""

    @abstractmethod
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
        """Gradients of query, key and value, shaped like them: [batch, heads, width, D];
        `lse` [batch, query heads, query width]. All of one dtype."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        part: Part,
        score_function: ScoreFunction,
    ) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for batch in part.batches:
            dtype = self.computing_dtype(query.dtype, batch)
            q = _pad(query, batch.queries, dtype)
            k, v = (_pad(tokens, batch.keys, dtype) for tokens in (key, value))
            out, lse = self.dense_forward(q, k, v, _scores(part, batch, score_function, dtype))
            outs.append(batch.queries.unpad(out.transpose(1, 2)))
            lses.append(batch.queries.unpad(lse.transpose(1, 2)))
        starts = [batch.queries.start for batch in part.batches]
        return _place(outs, starts, query, 0.0), _place(lses, starts, query[..., 0], -torch.inf)

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
        grads: tuple[list[Tensor], ...] = ([], [], [])
        for batch in part.batches:
            dtype = self.computing_dtype(query.dtype, batch)
            # With grad_out zero in padding, padded queries send no gradient anywhere.
            do = batch.queries.pad_with_zeros(grad_out.to(dtype)).transpose(1, 2)
            q, o = (_pad(tokens, batch.queries, dtype) for tokens in (query, out))
            s = _pad(lse, batch.queries, merge_dtype(dtype))
            k, v = (_pad(tokens, batch.keys, dtype) for tokens in (key, value))
            scores = _scores(part, batch, score_function, dtype)
            dq, dk, dv = self.dense_backward(do, q, k, v, o, s, scores)
            grads[0].append(batch.queries.unpad(dq.transpose(1, 2)))
            grads[1].append(batch.keys.unpad(dk.transpose(1, 2)))
            grads[2].append(batch.keys.unpad(dv.transpose(1, 2)))
        of_queries = [batch.queries.start for batch in part.batches]
        of_keys = [batch.keys.start for batch in part.batches]
        return (
            _place(grads[0], of_queries, query, 0.0),
            _place(grads[1], of_keys, key, 0.0),
            _place(grads[2], of_keys, value, 0.0),
        )


def _pad(tokens: Tensor, padded_tokens: PaddedTokens, dtype: torch.dtype) -> Tensor:
    """Tokens [N, heads, ...] as a dense batch [batch, heads, width, ...] in the computing dtype."""
    return padded_tokens.pad(tokens.to(dtype)).transpose(1, 2)


def _scores(
    part: Part, batch: PaddedBatch, function: ScoreFunction, dtype: torch.dtype
) -> DenseScores:
    bias = None if batch.key_bias is None else batch.key_bias.to(dtype)
    return DenseScores(function, bias, part.causal, part.window)


def _place(pieces: list[Tensor], starts: list[int], like: Tensor, fill: float) -> Tensor:
    """The pieces, each from its start on, shaped like `like`; `fill` in tokens without a score."""
    if len(pieces) == 1 and len(pieces[0]) == len(like):
        return pieces[0]
    if pieces and sum(map(len, pieces)) == len(like):
        return torch.cat(pieces)
    dtype = pieces[0].dtype if pieces else merge_dtype(like.dtype)
    whole = like.new_full(like.shape, fill, dtype=dtype)
    for start, piece in zip(starts, pieces, strict=True):
        whole[start : start + len(piece)] = piece
    return whole
