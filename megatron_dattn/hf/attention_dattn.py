"""Attention of a decoder layer: T2V and T2T of text rows, the diagonal V2V of visual rows.

Scores and probabilities are explicit, for readability. Parameters have Hugging Face's names.

This file travels with the exported weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .caches_dattn import DAttnCache
from .configuration_dattn import DAttnConfig

Rotary = tuple[Tensor, Tensor]  # cosine and sine, fp32 [batch, rows, head_dim] each
KeyValue = tuple[Tensor, Tensor]  # [batch, key heads, rows, head_dim] each


@dataclass(frozen=True)
class Seen:
    """Which keys every text row sees, bool [batch, text rows, keys]."""

    images: Tensor
    text: Tensor
    near_text: Tensor
    """In layers with a sliding window, which counts text rows; the same where there is none."""


def rotary_tables(positions: Tensor, head_dim: int, base: float) -> Rotary:
    """Angles of int64 positions [batch, rows], computed in fp32 whatever the model's dtype."""
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / (base ** (channels / head_dim))
    angles = positions.float().unsqueeze(-1) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, rotary: Rotary) -> Tensor:
    """Rotate [batch, heads, rows, head_dim] by the rows' angles."""
    cos, sin = (table.unsqueeze(1) for table in rotary)
    first, second = states.chunk(2, dim=-1)
    return (states * cos + torch.cat((-second, first), dim=-1) * sin).to(states.dtype)


class Projections(nn.Module):
    """Query, key, value and output projections, and what the language model does to scores."""

    def __init__(self, config: DAttnConfig) -> None:
        super().__init__()
        text = config.text_config
        self.head_dim = config.head_dim
        self.group = text.num_attention_heads // text.num_key_value_heads
        self.scale = (getattr(text, "query_pre_attn_scalar", None) or self.head_dim) ** -0.5
        self.softcap = getattr(text, "attn_logit_softcapping", None)
        queries = text.num_attention_heads * self.head_dim
        keys = text.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(text.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(text.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(text.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, text.hidden_size, bias=False)

    def keys_values(self, rows: Tensor) -> KeyValue:
        """Of normalized rows, [batch, rows, hidden]; keys without rotation."""
        return self._heads(self.k_proj(rows)), self._heads(self.v_proj(rows))

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        """[batch, key heads, group, rows, keys]; a key head serves a group of query heads."""
        rows = query.shape[2]
        grouped = query.unflatten(1, (-1, self.group)).flatten(2, 3)
        scores = grouped @ key.transpose(-1, -2) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores.unflatten(2, (self.group, rows))

    def _project_out(self, out: Tensor, dtype: torch.dtype) -> Tensor:
        """[batch, key heads, group, rows, head_dim] -> [batch, rows, hidden]."""
        return self.o_proj(out.to(dtype).flatten(1, 2).transpose(1, 2).flatten(2))


class CrossAttention(Projections):
    """T2V with projections of its own and without positions: merge "cascade"."""

    def forward(self, rows: Tensor, images: KeyValue, seen: Seen) -> Tensor:
        """What images add to text rows; arguments and result as of `Attention`."""
        key, value = images
        scores = self._scores(self._heads(self.q_proj(rows)), key)
        probabilities = _softmax(scores, seen.images[:, None, None])
        return self._project_out(_read(probabilities, value), rows.dtype)


class Attention(Projections):
    """T2V and T2T of the text rows; for visual rows, keys, values and the diagonal V2V."""

    def __init__(self, config: DAttnConfig, number: int) -> None:
        super().__init__(config)
        self.number = number
        self.slides = config.slides(number)
        self.merge, self.rotates_t2v = config.merge, config.t2v_rotary
        if config.merge in ("tanh", "sigmoid"):
            self.gate = nn.Parameter(torch.zeros(config.text_config.num_attention_heads))

    def own_values(self, value: Tensor) -> Tensor:
        """Equation 2: the softmax over oneself is 1, so a visual row's output is its own value."""
        heads = value.repeat_interleave(self.group, dim=1)
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    def forward(
        self, rows: Tensor, rotary: Rotary, images: KeyValue, seen: Seen, cache: DAttnCache
    ) -> Tensor:
        """Attention output of text rows, [batch, rows, hidden].

        Args:
            rows: normalized text rows.
            images: key and value of the visual rows, keys rotated where T2V is; not read by merge
                "cascade", which has read them before.
        """
        query, (key, value) = self._heads(self.q_proj(rows)), self.keys_values(rows)
        rotated = rotate(query, rotary)
        key, value = cache.update(rotate(key, rotary), value, self.number)
        t2t = self._scores(rotated, key)
        seen_text = (seen.near_text if self.slides else seen.text)[:, None, None]
        if self.merge == "cascade":
            return self._project_out(_read(_softmax(t2t, seen_text), value), rows.dtype)
        visual_key, visual_value = images
        t2v = self._scores(rotated if self.rotates_t2v else query, visual_key)
        seen_images = seen.images[:, None, None]
        if self.merge == "alpha":
            # One softmax over all keys is what the paper's alpha-weighting computes in parts.
            seen_all = torch.cat((seen_images, seen_text), dim=-1)
            joint = _softmax(torch.cat((t2v, t2t), dim=-1), seen_all)
            t2v, t2t = joint.split((t2v.shape[-1], t2t.shape[-1]), dim=-1)
            out = _read(t2v, visual_value) + _read(t2t, value)
        else:
            from_images = _read(_softmax(t2v, seen_images), visual_value)
            from_text = _read(_softmax(t2t, seen_text), value)
            out = self._join(from_images, from_text, seen_images.any(-1, keepdim=True))
        return self._project_out(out, rows.dtype)

    def _join(self, from_images: Tensor, from_text: Tensor, sees_images: Tensor) -> Tensor:
        if self.merge == "sum":
            return from_images + from_text
        gate = self.gate.view(-1, self.group, 1, 1)
        if self.merge == "tanh":
            return from_images * torch.tanh(gate) + from_text
        weight = torch.sigmoid(gate) * sees_images
        return weight * from_images + (1 - weight) * from_text


def _softmax(scores: Tensor, seen: Tensor) -> Tensor:
    """Probabilities in fp32 (fp64 for fp64 scores); all zero where a row sees nothing."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    masked = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return masked.softmax(dim=-1) * seen


def _read(probabilities: Tensor, value: Tensor) -> Tensor:
    """[batch, key heads, group, rows, keys] x [batch, key heads, keys, head_dim]."""
    group_rows = probabilities.shape[2:4]
    return (probabilities.flatten(2, 3).to(value.dtype) @ value).unflatten(2, group_rows)
