"""Attention of a decoder layer: T2V and T2T of text tokens, the diagonal V2V of visual tokens.

Prompts go through torch's scaled_dot_product_attention, in blocks of tokens, so that masks and
scores never fill the memory. Scores and probabilities are explicit where that cannot serve: for a
single new token, which reads the kept keys and values where they lie, for Gemma-2's softcap, and
for who asks for `attn_implementation="eager"`. Parameters have Hugging Face's names.

This file travels with the exported weights.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .caches_dattn import DAttnCache
from .configuration_dattn import DAttnConfig
from .norms_dattn import RMSNorm

Rotary = tuple[Tensor, Tensor]  # cosine and sine, fp32 [batch, tokens, head_dim] each
KeyValue = tuple[Tensor, Tensor]  # [batch, key heads, tokens, head_dim] each

# How many scores exist at a time: 256 MiB of fp32 in each of the few tensors that hold them.
MAX_SCORES = 2**26


@dataclass(frozen=True)
class Seen:
    """Which keys every text token sees, bool [batch, text tokens, keys]."""

    images: Tensor
    text: Tensor
    near_text: Tensor
    """In layers with a sliding window, which counts text tokens; the same where there is none."""

    def blocks(self, num_heads: int) -> Iterator[tuple[slice, "Seen"]]:
        """Consecutive text tokens, so few that their scores are at most `MAX_SCORES`."""
        batch, tokens, num_visual = self.images.shape
        size = max(1, MAX_SCORES // (batch * num_heads * (num_visual + self.text.shape[2])))
        for start in range(0, tokens, size):
            block = slice(start, start + size)
            yield (
                block,
                Seen(self.images[:, block], self.text[:, block], self.near_text[:, block]),
            )


def rotary_tables(positions: Tensor, head_dim: int, rope: dict[str, Any]) -> Rotary:
    """Angles of int64 positions [batch, tokens], computed in fp32 whatever the model's dtype.

    Args:
        rope: the config's `rope_parameters`, of type "default" or "llama3".
    """
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / (rope["rope_theta"] ** (channels / head_dim))
    if rope["rope_type"] == "llama3":
        # Pairs of channels that turn often over the length of the first training stay as they are;
        # those that turn rarely are slowed down; between the two it goes by degrees.
        turns = rope["original_max_position_embeddings"] / (2 * math.pi / frequencies)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - kept) * frequencies / rope["factor"] + kept * frequencies
    elif rope["rope_type"] != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r}; this code knows 'default', 'llama3'")
    angles = positions.float().unsqueeze(-1) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, rotary: Rotary) -> Tensor:
    """Rotate [batch, heads, tokens, head_dim] by the tokens' angles; same dtype."""
    cos, sin = (table.unsqueeze(1) for table in rotary)
    first, second = states.chunk(2, dim=-1)
    return (states * cos + torch.cat((-second, first), dim=-1) * sin).to(states.dtype)


class Projections(nn.Module):
    """Query, key, value and output projections, and what the language model does to scores.

    Args:
        bias: of queries, keys and values.
    """

    def __init__(self, config: DAttnConfig, bias: bool = False) -> None:
        super().__init__()
        text = config.text_config
        self.config = config
        self.head_dim = config.head_dim
        self.num_heads = text.num_attention_heads
        self.group = text.num_attention_heads // text.num_key_value_heads
        self.scale = (getattr(text, "query_pre_attn_scalar", None) or self.head_dim) ** -0.5
        self.softcap = getattr(text, "attn_logit_softcapping", None)
        queries = text.num_attention_heads * self.head_dim
        keys = text.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(text.hidden_size, queries, bias=bias)
        self.k_proj = nn.Linear(text.hidden_size, keys, bias=bias)
        self.v_proj = nn.Linear(text.hidden_size, keys, bias=bias)
        self.o_proj = nn.Linear(queries, text.hidden_size, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()

    def queries(self, tokens: Tensor) -> Tensor:
        """Of normalized tokens, [batch, tokens, hidden], in their dtype, without rotation:
        [batch, heads, tokens, head_dim]."""
        return self.q_norm(self._heads(self.q_proj(tokens)))

    def keys_values(self, tokens: Tensor) -> KeyValue:
        """Of normalized tokens, [batch, tokens, hidden], in their dtype; keys without rotation."""
        return self.k_norm(self._heads(self.k_proj(tokens))), self._heads(self.v_proj(tokens))

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        """What tokens read of one set of keys, [batch, key heads, group, tokens, head_dim].

        Args:
            seen: bool [batch, tokens, keys].
        """
        if self._is_fused(query) and key.shape[2]:  # not all of torch's kernels take no key
            return self._fused(query, key, value, seen)
        return _read(_softmax(self._scores(query, key), seen), value)

    def _is_fused(self, query: Tensor) -> bool:
        wanted = self.config._attn_implementation == "sdpa" and self.softcap is None
        return wanted and query.shape[2] > 1

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        """As `_attend`, by torch's kernels, which want one width of keys and values."""
        tokens, width = query.shape[2], value.shape[3]
        value = F.pad(value, (0, key.shape[3] - width))
        # A token that sees nothing would be a softmax over nothing: it sees all, and counts as
        # zero.
        sees = seen.any(-1, keepdim=True)
        mask = (seen | ~sees).repeat(1, self.group, 1).unsqueeze(1)
        out = F.scaled_dot_product_attention(
            self._grouped(query), key, value, attn_mask=mask, scale=self.scale
        )
        return out[..., :width].unflatten(2, (self.group, tokens)) * sees[:, None, None]

    def _grouped(self, query: Tensor) -> Tensor:
        """[batch, key heads, group * tokens, head_dim]; a key head serves a group of query
        heads."""
        return query.unflatten(1, (-1, self.group)).flatten(2, 3)

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        """[batch, key heads, group, tokens, keys]."""
        scores = self._grouped(query) @ key.transpose(-1, -2) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores.unflatten(2, (self.group, query.shape[2]))

    def _project_out(self, out: Tensor, dtype: torch.dtype) -> Tensor:
        """[batch, key heads, group, tokens, head_dim] -> [batch, tokens, hidden]."""
        return self.o_proj(out.to(dtype).flatten(1, 2).transpose(1, 2).flatten(2))


class CrossAttention(Projections):
    """T2V with projections of its own and without positions: merge "cascade"."""

    def forward(self, tokens: Tensor, images: KeyValue, seen: Seen) -> Tensor:
        """The images' share of tokens, [batch, tokens, hidden], same dtype; arguments as of
        `Attention`."""
        query = self.queries(tokens)
        out = [
            self._attend(query[:, :, block], *images, seen_here.images)
            for block, seen_here in seen.blocks(self.num_heads)
        ]
        return self._project_out(torch.cat(out, dim=3), tokens.dtype)


class Attention(Projections):
    """T2V and T2T of the text tokens; for visual tokens, keys, values and the diagonal V2V."""

    def __init__(self, config: DAttnConfig, number: int) -> None:
        super().__init__(config, bias=config.has_qkv_bias)
        self.number = number
        if config.has_qk_norms:
            eps = config.text_config.rms_norm_eps
            self.q_norm, self.k_norm = RMSNorm(self.head_dim, eps), RMSNorm(self.head_dim, eps)
        self.slides = config.slides(number)
        self.merge, self.rotates_t2v = config.merge, config.t2v_rotary
        if config.merge in ("tanh", "sigmoid"):
            self.gate = nn.Parameter(torch.zeros(config.text_config.num_attention_heads))

    def own_values(self, value: Tensor) -> Tensor:
        """Equation 2: the softmax over oneself is 1, so a visual token's output is its own value.
        [images, key heads, tokens, head_dim] -> [images, tokens, hidden], same dtype."""
        heads = value.repeat_interleave(self.group, dim=1)
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    def forward(
        self, tokens: Tensor, rotary: Rotary, images: KeyValue, seen: Seen, cache: DAttnCache | None
    ) -> Tensor:
        """Attention output of text tokens, [batch, tokens, hidden], in the dtype of `tokens`.

        Args:
            tokens: normalized text tokens.
            images: key and value of the visual tokens, keys rotated where T2V is; not read by merge
                "cascade", which has read them before.
            cache: gives the text before these tokens, and takes theirs; None where they are all the
                text, and nothing is to be remembered.
        """
        query, (key, value) = self.queries(tokens), self.keys_values(tokens)
        rotated = rotate(query, rotary)
        text: KeyValue = (rotate(key, rotary), value)
        if cache is not None:
            text = cache.update(*text, self.number)
        of_images = rotated if self.rotates_t2v else query
        out = [
            self._attend_both(of_images[:, :, block], rotated[:, :, block], images, text, seen_here)
            for block, seen_here in seen.blocks(self.num_heads)
        ]
        return self._project_out(torch.cat(out, dim=3), tokens.dtype)

    def _attend_both(
        self, of_images: Tensor, of_text: Tensor, images: KeyValue, text: KeyValue, seen: Seen
    ) -> Tensor:
        """What tokens with these queries to images and to text read, [batch, key heads, group,
        tokens, head_dim]."""
        seen_text = seen.near_text if self.slides else seen.text
        if self.merge == "alpha":
            return self._joint(of_images, of_text, images, text, (seen.images, seen_text))
        from_text = self._attend(of_text, *text, seen_text)
        if self.merge == "cascade":
            return from_text
        from_images = self._attend(of_images, *images, seen.images)
        return self._join(from_images, from_text, seen.images.any(-1)[:, None, None, :, None])

    def _joint(
        self,
        of_images: Tensor,
        of_text: Tensor,
        images: KeyValue,
        text: KeyValue,
        seen: tuple[Tensor, Tensor],
    ) -> Tensor:
        """One softmax over all keys: what the paper's alpha-weighting computes in parts."""
        (visual_key, visual_value), (key, value) = images, text
        seen_all = torch.cat(seen, dim=-1)
        if self._is_fused(of_text):
            # Queries of both kinds side by side; zeros in a key let it meet the one that is its.
            query = torch.cat((of_images, of_text), dim=-1)
            visual_key = F.pad(visual_key, (0, self.head_dim))
            key = F.pad(key, (self.head_dim, 0))
            keys = torch.cat((visual_key, key), dim=2)
            values = torch.cat((visual_value, value), dim=2)
            return self._fused(query, keys, values, seen_all)
        t2v, t2t = self._scores(of_images, visual_key), self._scores(of_text, key)
        joint = _softmax(torch.cat((t2v, t2t), dim=-1), seen_all)
        t2v, t2t = joint.split((t2v.shape[-1], t2t.shape[-1]), dim=-1)
        return _read(t2v, visual_value) + _read(t2t, value)

    def _join(self, from_images: Tensor, from_text: Tensor, sees_images: Tensor) -> Tensor:
        if self.merge == "sum":
            return from_images + from_text
        gate = self.gate.view(-1, self.group, 1, 1)
        if self.merge == "tanh":
            return from_images * torch.tanh(gate) + from_text
        weight = torch.sigmoid(gate) * sees_images
        return weight * from_images + (1 - weight) * from_text


def _softmax(scores: Tensor, seen: Tensor) -> Tensor:
    """Probabilities of scores [batch, key heads, group, tokens, keys], seen bool [batch, tokens,
    keys], in fp32 (fp64 for fp64 scores); all zero where a token sees nothing."""
    seen = seen[:, None, None]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    masked = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return masked.softmax(dim=-1) * seen


def _read(probabilities: Tensor, value: Tensor) -> Tensor:
    """[batch, key heads, group, tokens, keys] x [batch, key heads, keys, head_dim]."""
    group_rows = probabilities.shape[2:4]
    return (probabilities.flatten(2, 3).to(value.dtype) @ value).unflatten(2, group_rows)
