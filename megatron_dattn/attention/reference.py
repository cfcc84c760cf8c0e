"""The oracle: what a preset means, written to be obviously right and as slow as it likes.

Every packed row is described in words, `sees` says of one pair of rows whether the first sees the
second, and one dense softmax runs over the keys that a row sees (equation 3). No parts, no merging,
no kernels: nothing here is shared with the fast path but the layout's own fields. Use float64 and
small layouts; autograd gives the gradients.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.positions import Rotary, apply_rotary


@dataclass(frozen=True)
class DescribedRow:
    """One packed row: whose it is, and its place among the rows of its kind."""

    kind: str  # "visual", "text" or "padding"
    sample: int = -1
    index: int = -1  # visual: place among the pack's visual rows; text: place in its own text
    text_before: int = -1  # visual: text rows of the sample that stand before the image


def describe_rows(layout: TokenLayout) -> list[DescribedRow]:
    """All packed rows in order."""
    visual: list[DescribedRow] = []
    for image in layout.images:
        for _ in range(image.grid[0] * image.grid[1]):
            visual.append(DescribedRow("visual", image.sample, len(visual), image.text_offset))
    text: list[DescribedRow] = []
    for sample, length in enumerate(layout.text_lengths):
        for index in range(length):
            text.append(DescribedRow("text", sample, index))
    visual += [DescribedRow("padding")] * (layout.visual_budget - len(visual))
    text += [DescribedRow("padding")] * (layout.text_budget - len(text))
    return visual + text


def sees(query: DescribedRow, key: DescribedRow, config: AttentionConfig) -> bool:
    """Whether the score of this (query, key) pair takes part in the query's softmax."""
    if "padding" in (query.kind, key.kind) or query.sample != key.sample:
        return False
    match query.kind, key.kind:
        case "text", "text":
            return key.index <= query.index
        case "visual", "visual":
            return key.index <= query.index if config.v2v == "causal" else key == query
        case "visual", "text":
            return config.v2t == "preceding" and key.index < query.text_before
        case "text", "visual":
            return config.t2v.scope == "all" or key.text_before <= query.index
    raise AssertionError(f"a {query.kind} row cannot query a {key.kind} row")


def is_rotated(query: DescribedRow, key: DescribedRow, config: AttentionConfig) -> bool:
    """Whether the score of this pair uses rotary positions."""
    return config.t2v.rotary or (query.kind, key.kind) != ("text", "visual")


def pair_masks(layout: TokenLayout, config: AttentionConfig) -> tuple[Tensor, Tensor]:
    """`sees` and `is_rotated` of every (query row, key row) pair, bool [S, S] each."""
    rows = describe_rows(layout)
    seen = [[sees(query, key, config) for key in rows] for query in rows]
    rotated = [[is_rotated(query, key, config) for key in rows] for query in rows]
    return torch.tensor(seen), torch.tensor(rotated)


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    config: AttentionConfig,
    rotary: Rotary,
    *,
    scale: float,
) -> Tensor:
    """What `decomposed_attention` computes, [S, Hq, D]; arguments as there.

    A row that sees nothing gives zero, except that under v2v="diagonal" every visual row, padding
    too, gives its own value: a softmax over one key is 1 whatever its score.
    """
    seen, rotated = (mask.to(query.device) for mask in pair_masks(layout, config))
    group = query.shape[1] // key.shape[1]
    keys, values = (rows.repeat_interleave(group, dim=1) for rows in (key, value))
    plain_scores = torch.einsum("qhd,khd->hqk", query, keys)
    rotated_scores = torch.einsum(
        "qhd,khd->hqk", apply_rotary(query, rotary), apply_rotary(keys, rotary)
    )
    scores = torch.where(rotated, rotated_scores, plain_scores) * scale
    # A large negative number instead of -inf: rows without keys then have no NaN in any gradient.
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    probabilities = torch.softmax(scores, dim=-1) * seen
    out = torch.einsum("hqk,khd->qhd", probabilities, values)
    if config.v2v == "diagonal":
        out = torch.cat((values[: layout.visual_budget], out[layout.visual_budget :]))
    return out
