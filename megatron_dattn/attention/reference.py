"""The oracle: what a preset means, written to be obviously right and as slow as it likes.

Every packed token is described in words, `sees` says of one pair of tokens whether the first sees
the second, and a dense softmax runs over the keys that a token sees (equation 3): one over all, or
one over images and one over the rest where the merge says so. No parts, no log-sum-exps, no
kernels. What is shared with the fast path: the layout's own fields, the configuration's axes, and
the rotation by given angles (`rotary_tables`, `apply_rotary`), which has tests of its own. Use
float64 and small layouts; autograd gives the gradients.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dattn.attention.backends.base import ScoreFunction
from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.positions import Rotary, apply_rotary


@dataclass(frozen=True)
class DescribedToken:
    """One packed token: whose it is, and its place among the tokens of its kind."""

    kind: str  # "visual", "text" or "padding"
    sample: int = -1
    index: int = -1  # visual: place among the pack's visual tokens; text: place in its own text
    text_before: int = -1  # visual: text tokens of the sample that stand before the image
    image: int = -1  # visual: place of the image in the pack
    patch: tuple[int, int] = (-1, -1)  # visual: row and column in the image
    ring: int = -1  # visual: distance of the patch to the border of its image
    place: int = -1  # place in the sample's reading order
    in_prompt: bool = False  # text: whether it stands before all supervised text


def describe_tokens(layout: TokenLayout) -> list[DescribedToken]:
    """All packed tokens in order."""
    visual: list[DescribedToken] = []
    for number, image in enumerate(layout.images):
        height, width = image.grid
        for i in range(height):
            for j in range(width):
                ring = min(i, j, height - 1 - i, width - 1 - j)
                earlier = sum(token.sample == image.sample for token in visual)
                place = image.text_offset + earlier
                token = (image.sample, len(visual), image.text_offset, number, (i, j), ring, place)
                visual.append(DescribedToken("visual", *token))
    text: list[DescribedToken] = []
    prompts = layout.prompt_lengths or (0,) * layout.num_samples
    for sample, length in enumerate(layout.text_lengths):
        for index in range(length):
            before = sum(v.sample == sample and v.text_before <= index for v in visual)
            in_prompt = index < prompts[sample]
            text.append(
                DescribedToken("text", sample, index, place=index + before, in_prompt=in_prompt)
            )
    visual += [DescribedToken("padding")] * (layout.visual_budget - len(visual))
    text += [DescribedToken("padding")] * (layout.text_budget - len(text))
    return visual + text


def described_positions(layout: TokenLayout, config: AttentionConfig) -> list[int]:
    """The rotary position of every packed token; 0 for tokens that have none.

    Counted anew for each token from what stands before it, as the axes are worded.
    """
    tokens = describe_tokens(layout)
    return [_position(token, tokens, layout, config) for token in tokens]


def _position(
    token: DescribedToken,
    tokens: list[DescribedToken],
    layout: TokenLayout,
    config: AttentionConfig,
) -> int:
    if token.kind == "padding" or (token.kind == "visual" and config.positions.visual == "none"):
        return 0
    before = [o for o in tokens if o.kind != "padding" and o.sample == token.sample]
    before = [o for o in before if o.place < token.place]
    text = sum(o.kind == "text" for o in before)
    if token.kind == "text" and config.positions.text == "text_only":
        return text
    if config.positions.visual != "ring":
        return len(before)
    # One id per ring: all of those of earlier images, and those outside of its own.
    rings = {(o.image, o.ring) for o in before if o.kind == "visual" and o.image != token.image}
    return text + len(rings) + max(token.ring, 0)


def sees(
    query: DescribedToken, key: DescribedToken, config: AttentionConfig, window: int | None = None
) -> bool:
    """True if the score of this (query, key) pair takes part in the query's softmax."""
    if window is not None and _distance(query, key, config) >= window:
        return False
    if "padding" in (query.kind, key.kind) or query.sample != key.sample:
        return False
    match query.kind, key.kind:
        case "text", "text":
            return key.index <= query.index
        case "visual", "visual":
            return _patch_sees_patch(query, key, config)
        case "visual", "text":
            if config.v2t == "prompt" and key.in_prompt:
                return True
            return config.v2t != "none" and key.index < query.text_before
        case "text", "visual":
            return config.t2v.scope == "all" or key.text_before <= query.index
    raise AssertionError(f"a {query.kind} token cannot query a {key.kind} token")


def _distance(query: DescribedToken, key: DescribedToken, config: AttentionConfig) -> int:
    """How far back the key lies, for a sliding window; 0 where there is none."""
    if _counts_everything(config):
        return query.place - key.place
    if (query.kind, key.kind) == ("text", "visual"):
        # The image lies as far back as a text token in its place would.
        inherits = config.t2v.window == "inherit"
        return query.index - (key.text_before - 1) if inherits else 0
    is_causal = query.kind == "text" or config.v2v == "causal"
    return query.index - key.index if query.kind == key.kind and is_causal else 0


def _counts_everything(config: AttentionConfig) -> bool:
    """Whether a window counts tokens of both kinds; it does where images are read like text."""
    if config.window == "reading_order":
        return True
    t2v = (config.t2v.scope, config.t2v.rotary, config.t2v.window)
    like_text = (config.v2v, config.v2t, config.merge) == ("causal", "preceding", "alpha")
    return like_text and t2v == ("following", True, "none")


def _patch_sees_patch(query: DescribedToken, key: DescribedToken, config: AttentionConfig) -> bool:
    match config.v2v:
        case "causal":
            return key.index <= query.index
        case "ring":
            outer = key.image == query.image and key.ring <= query.ring
            return key.image < query.image or outer
        case "window":
            assert config.v2v_window is not None
            apart = (abs(a - b) for a, b in zip(query.patch, key.patch, strict=True))
            return key.image == query.image and max(apart) <= (config.v2v_window - 1) / 2
        case "diagonal":
            return key == query
        case "none":
            return False


def is_rotated(query: DescribedToken, key: DescribedToken, config: AttentionConfig) -> bool:
    """True if the score of this pair uses rotary positions."""
    return config.t2v.rotary or (query.kind, key.kind) != ("text", "visual")


def pair_masks(
    layout: TokenLayout, config: AttentionConfig, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """`sees` and `is_rotated` of every (query token, key token) pair, bool [S, S] each."""
    tokens = describe_tokens(layout)
    seen = [[sees(query, key, config, window) for key in tokens] for query in tokens]
    rotated = [[is_rotated(query, key, config) for key in tokens] for query in tokens]
    return torch.tensor(seen), torch.tensor(rotated)


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    config: AttentionConfig,
    rotary: Rotary,
    *,
    score_function: ScoreFunction,
    gate: Tensor | None = None,
    head_mask: Tensor | None = None,
    window: int | None = None,
    images_alone: bool = False,
) -> Tensor:
    """The result of `decomposed_attention`, [S, Hq, D], of the dtype of `query`; arguments as there
    and in `plan_attention`.

    A token that sees nothing gives zero, except that under v2v="diagonal" every visual token,
    padding too, gives its own value: a softmax over one key is 1 whatever its score. With
    `images_alone` it is the cross-attention of merge "cascade": text tokens over images.
    """
    seen, rotated = (mask.to(query.device) for mask in pair_masks(layout, config, window))
    group = query.shape[1] // key.shape[1]
    keys, values = (tokens.repeat_interleave(group, dim=1) for tokens in (key, value))
    head_is_read = torch.ones_like(query[..., :1])
    if head_mask is not None:
        head_is_read[: layout.visual_budget] = head_mask.repeat_interleave(group).unsqueeze(-1)
    values = values * head_is_read
    plain_scores = torch.einsum("qhd,khd->hqk", query, keys)
    rotated_scores = torch.einsum(
        "qhd,khd->hqk", apply_rotary(query, rotary), apply_rotary(keys, rotary)
    )
    scores = torch.where(rotated, rotated_scores, plain_scores) * score_function.scale
    if (softcap := score_function.softcap) is not None:
        scores = softcap * torch.tanh(scores / softcap)

    def softmax_over(chosen: Tensor) -> Tensor:
        # A large negative number instead of -inf: tokens without keys then have no NaN in
        # gradients.
        masked = scores.masked_fill(~chosen, torch.finfo(scores.dtype).min)
        return torch.einsum("hqk,khd->qhd", torch.softmax(masked, dim=-1) * chosen, values)

    if config.merge == "alpha":
        out = softmax_over(seen)
    else:
        is_t2v = torch.zeros_like(seen)
        is_t2v[layout.visual_budget :, : layout.visual_budget] = True
        image, rest = softmax_over(seen & is_t2v), softmax_over(seen & ~is_t2v)
        if images_alone:
            return image
        sees_image = (seen & is_t2v).any(dim=1)[:, None, None]
        out = _join(image, rest, config, gate, sees_image)
    if config.v2v == "diagonal":
        out = torch.cat((values[: layout.visual_budget], out[layout.visual_budget :]))
    return out * head_is_read


def _join(
    image: Tensor, rest: Tensor, config: AttentionConfig, gate: Tensor | None, sees_image: Tensor
) -> Tensor:
    if config.merge == "sum":
        return image + rest
    if config.merge == "cascade":
        return rest
    assert gate is not None, f"merge {config.merge!r} has a gate"
    if config.merge == "tanh":
        return image * torch.tanh(gate[:, None]) + rest
    weight = torch.sigmoid(gate[:, None])
    return torch.where(sees_image, weight * image + (1 - weight) * rest, rest)
