"""The language model's layers over two kinds of rows: text rows (T) and visual rows (V).

Visual rows of an image depend on that image alone: a layer adds to each its own value (V2V
diagonal) and its FFN, and no row of another image or of the text. So `DecoderLayer.images` runs
over images without any text, and `DecoderLayer.forward` runs over text rows that read the keys and
values which the images left. Parameters have the names of Hugging Face's Mistral.

This file travels with the exported weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .caches_dattn import DAttnCache
from .configuration_dattn import DAttnConfig
from .vision_dattn import RMSNorm

Rotary = tuple[Tensor, Tensor]  # cosine and sine, fp32 [batch, rows, head_dim] each


@dataclass(frozen=True)
class Seen:
    """Which keys every text row sees, bool [batch, text rows, keys]."""

    images: Tensor
    text: Tensor


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


class Attention(nn.Module):
    """T2V and T2T of the text rows; for visual rows, keys, values and the diagonal V2V."""

    def __init__(self, config: DAttnConfig, number: int) -> None:
        super().__init__()
        text = config.text_config
        self.number = number
        self.head_dim = (
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        )
        self.group = text.num_attention_heads // text.num_key_value_heads
        self.scale = self.head_dim**-0.5
        self.merge, self.rotates_t2v = config.merge, config.t2v_rotary
        queries = text.num_attention_heads * self.head_dim
        keys = text.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(text.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(text.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(text.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, text.hidden_size, bias=False)
        if config.merge in ("tanh", "sigmoid"):
            self.gate = nn.Parameter(torch.zeros(text.num_attention_heads))

    def keys_values(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, rows, hidden] -> two of [batch, key heads, rows, head_dim]."""
        return self._heads(self.k_proj(rows)), self._heads(self.v_proj(rows))

    def own_values(self, value: Tensor) -> Tensor:
        """Equation 2: the softmax over oneself is 1, so a visual row's output is its own value."""
        heads = value.repeat_interleave(self.group, dim=1)
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    def forward(
        self,
        rows: Tensor,
        rotary: Rotary,
        images: tuple[Tensor, Tensor],
        seen: Seen,
        cache: DAttnCache,
    ) -> Tensor:
        """Attention output of text rows, [batch, rows, hidden].

        Args:
            rows: normalized text rows.
            images: key and value of the visual rows, [batch, key heads, visual rows, head_dim].
        """
        query, (key, value) = self._heads(self.q_proj(rows)), self.keys_values(rows)
        rotated = rotate(query, rotary)
        key, value = cache.update(rotate(key, rotary), value, self.number)
        visual_key, visual_value = images
        t2v = self._scores(rotated if self.rotates_t2v else query, visual_key)
        t2t = self._scores(rotated, key)
        seen_images, seen_text = (mask[:, None, None] for mask in (seen.images, seen.text))
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
        # [batch, key heads, group, rows, head_dim] -> [batch, rows, hidden]
        return self.o_proj(out.to(rows.dtype).flatten(1, 2).transpose(1, 2).flatten(2))

    def _join(self, from_images: Tensor, from_text: Tensor, sees_images: Tensor) -> Tensor:
        if self.merge == "sum":
            return from_images + from_text
        gate = self.gate.view(-1, self.group, 1, 1)
        if self.merge == "tanh":
            return from_images * torch.tanh(gate) + from_text
        weight = torch.sigmoid(gate) * sees_images
        return weight * from_images + (1 - weight) * from_text

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        """[batch, key heads, group, rows, keys]; a key head serves a group of query heads."""
        rows = query.shape[2]
        grouped = query.unflatten(1, (-1, self.group)).flatten(2, 3)
        scores = grouped @ key.transpose(-1, -2) * self.scale
        return scores.unflatten(2, (self.group, rows))


def _softmax(scores: Tensor, seen: Tensor) -> Tensor:
    """Probabilities in fp32 (fp64 for fp64 scores); all zero where a row sees nothing."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    masked = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return masked.softmax(dim=-1) * seen


def _read(probabilities: Tensor, value: Tensor) -> Tensor:
    """[batch, key heads, group, rows, keys] x [batch, key heads, keys, head_dim]."""
    group_rows = probabilities.shape[2:4]
    return (probabilities.flatten(2, 3).to(value.dtype) @ value).unflatten(2, group_rows)


class GatedMLP(nn.Module):
    def __init__(self, config: DAttnConfig) -> None:
        super().__init__()
        text = config.text_config
        self.gate_proj = nn.Linear(text.hidden_size, text.intermediate_size, bias=False)
        self.up_proj = nn.Linear(text.hidden_size, text.intermediate_size, bias=False)
        self.down_proj = nn.Linear(text.intermediate_size, text.hidden_size, bias=False)
        self.activation = ACT2FN[text.hidden_act]

    def forward(self, rows: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(rows)) * self.up_proj(rows))


class DecoderLayer(nn.Module):
    def __init__(self, config: DAttnConfig, number: int) -> None:
        super().__init__()
        text = config.text_config
        self.self_attn = Attention(config, number)
        self.mlp = GatedMLP(config)
        self.input_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.is_last = number == text.num_hidden_layers - 1
        self.adds_own_values = config.v2v == "diagonal"

    def images(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Key, value and new state of images' rows, [images, rows, hidden].

        The last layer leaves the state as it is: no one reads it.
        """
        key, value = self.self_attn.keys_values(self.input_layernorm(rows))
        if self.is_last:
            return key, value, rows
        if self.adds_own_values:
            rows = rows + self.self_attn.own_values(value)
        return key, value, self._transform(rows)

    def forward(
        self,
        rows: Tensor,
        rotary: Rotary,
        images: tuple[Tensor, Tensor],
        seen: Seen,
        cache: DAttnCache,
    ) -> Tensor:
        """New state of text rows; arguments as of `Attention.forward`."""
        normed = self.input_layernorm(rows)
        return self._transform(rows + self.self_attn(normed, rotary, images, seen, cache))

    def _transform(self, rows: Tensor) -> Tensor:
        return rows + self.mlp(self.post_attention_layernorm(rows))
