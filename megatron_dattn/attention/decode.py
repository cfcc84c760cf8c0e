"""Attention of the newest token of each sample over keys that were remembered: one step of
generation.

There is one query per head, so every query head of a group is a row of one small matrix and reads
the group's keys once. Keys come as they are scored: rotated, or not where T2V has no positions.
There is no gradient. What is hidden from whom is said by a `DecodePlan`.
"""

import torch
from torch import Tensor

from megatron_dattn.attention.backends.base import ScoreFunction
from megatron_dattn.attention.backends.dense import DenseBackend, DenseScores
from megatron_dattn.attention.config import Merge
from megatron_dattn.attention.merge import alpha_merge, weighted_merge
from megatron_dattn.attention.plan.decode import DecodePlan

SampleKeyValue = tuple[Tensor, Tensor]
"""Of tokens by sample, [samples, columns, key heads, head_dim] each."""


def attend_newest(
    query_to_images: Tensor,
    query_to_text: Tensor,
    images: SampleKeyValue | None,
    text: SampleKeyValue,
    plan: DecodePlan,
    *,
    merge: Merge,
    score_function: ScoreFunction,
    backend: DenseBackend,
    gate: Tensor | None = None,
) -> Tensor:
    """Attention output of one token per sample, [samples, key heads * group, head_dim], of
    the query's dtype.

    Args:
        query_to_images: as its scores with images want it, rotated or not, [samples, key heads,
            group, head_dim], of one dtype with keys and values.
        query_to_text: the same for text, rotated.
        images: of visual tokens; None if there are none, or a cross-attention reads them.
        gate: [key heads * group] or [1], any floating dtype, of the merges "tanh" and "sigmoid".
    """
    text_out, text_lse = _softmax(query_to_text, text, plan.text_bias, score_function, backend)
    dtype = query_to_text.dtype
    if images is None:
        return text_out.flatten(1, 2).to(dtype)
    out, lse = _softmax(query_to_images, images, plan.images_bias, score_function, backend)
    sees = plan.sees_images
    if merge == "alpha":
        if sees is not None:
            lse = lse.masked_fill(~sees[:, None, None], -torch.inf)
        return alpha_merge(out, lse, text_out, text_lse)[0].flatten(1, 2).to(dtype)
    if sees is None:
        sees = torch.ones(len(out), dtype=torch.bool, device=out.device)
    else:
        out = out * sees[:, None, None, None]
    joined = weighted_merge(out.flatten(1, 2), text_out.flatten(1, 2), merge, gate, sees)
    return joined.to(dtype)


def read_images(
    query: Tensor,
    images: SampleKeyValue,
    plan: DecodePlan,
    score_function: ScoreFunction,
    backend: DenseBackend,
) -> Tensor:
    """T2V alone, of merge "cascade", [samples, query heads, head_dim], shape and dtype of `query`,
    which is not rotated. Samples that see no image give zero."""
    grouped = query.unflatten(1, (images[0].shape[2], -1))
    out, _ = _softmax(grouped, images, plan.images_bias, score_function, backend)
    if plan.sees_images is not None:
        out = out * plan.sees_images[:, None, None, None]
    return out.flatten(1, 2).to(query.dtype)


def _softmax(
    query: Tensor,
    tokens: SampleKeyValue,
    bias: Tensor | None,
    function: ScoreFunction,
    backend: DenseBackend,
) -> tuple[Tensor, Tensor]:
    """Output [samples, key heads, group, head_dim] and log-sum-exp, without the last dimension."""
    dtype = backend.decoding_dtype(query.dtype)
    key, value = (states.transpose(1, 2).to(dtype) for states in tokens)
    scores = DenseScores(function, bias, causal=False, window=None)
    return backend.dense_forward(query.to(dtype), key, value, scores)
