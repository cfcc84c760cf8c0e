"""The D-Attn model in plain PyTorch, as one would write it without any framework.

`benchmarks/bench_step.py` times the training engine against it. It has the same mathematics and
weights and nothing else: one process, one image per sample, text padded to the longest of the
batch, one dense softmax over visual and text keys. Visual tokens project no query, as they need
none.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dattn.attention.positions import apply_rotary
from megatron_dattn.batch import IGNORED_LABEL
from megatron_dattn.models.config import LanguageConfig, ModelConfig, VisionConfig


class VisionLayer(nn.Module):
    """One SigLIP layer."""

    def __init__(self, sizes: VisionConfig) -> None:
        super().__init__()
        hidden = sizes.hidden_size
        self.num_heads = sizes.num_attention_heads
        self.norm1 = nn.LayerNorm(hidden, sizes.layer_norm_eps)
        self.norm2 = nn.LayerNorm(hidden, sizes.layer_norm_eps)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.up = nn.Linear(hidden, sizes.intermediate_size)
        self.down = nn.Linear(sizes.intermediate_size, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Patches [images, patches, hidden] -> the same shape and dtype."""
        batch, patches, hidden = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, patches, self.num_heads, 3, -1)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, patches, hidden))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class DecoderLayer(nn.Module):
    """One Mistral layer over visual tokens [B, V, H] and text tokens [B, T, H]."""

    def __init__(self, sizes: LanguageConfig) -> None:
        super().__init__()
        self.heads, self.groups = sizes.num_attention_heads, sizes.num_key_value_heads
        self.head_dim = sizes.head_dim
        hidden, keys = sizes.hidden_size, self.groups * self.head_dim
        self.norm1 = nn.RMSNorm(hidden, sizes.rms_norm_eps)
        self.norm2 = nn.RMSNorm(hidden, sizes.rms_norm_eps)
        self.q = nn.Linear(hidden, self.heads * self.head_dim, bias=False)
        self.kv = nn.Linear(hidden, 2 * keys, bias=False)
        self.out = nn.Linear(self.heads * self.head_dim, hidden, bias=False)
        self.gate_up = nn.Linear(hidden, 2 * sizes.intermediate_size, bias=False)
        self.down = nn.Linear(sizes.intermediate_size, hidden, bias=False)

    def forward(self, tokens: Tensor, num_visual: int, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Tokens [B, V + T, H] -> the same shape and dtype; tables fp32 [T, head_dim] each."""
        tokens = tokens + self.attend(self.norm1(tokens), num_visual, rotary)
        gate, up = self.gate_up(self.norm2(tokens)).chunk(2, dim=-1)
        return tokens + self.down(F.silu(gate) * up)

    def attend(self, tokens: Tensor, num_visual: int, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Attention's addend for normalized tokens, [B, V + T, H] -> the same shape and dtype."""
        batch, length, _ = tokens.shape
        num_text = length - num_visual
        q = self.q(tokens[:, num_visual:]).view(batch, num_text, self.heads, self.head_dim)
        k, v = self.kv(tokens).view(batch, length, 2, self.groups, self.head_dim).unbind(2)
        group = self.heads // self.groups
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))  # [B, V+T, heads, head_dim]
        visual_scores = torch.einsum("bthd,bvhd->bhtv", q, k[:, :num_visual])
        text_scores = torch.einsum(
            "bthd,bshd->bhts", apply_rotary(q, rotary), apply_rotary(k[:, num_visual:], rotary)
        )
        future = torch.ones(num_text, num_text, dtype=torch.bool, device=q.device).triu(1)
        text_scores = text_scores.masked_fill(future, -torch.inf)
        scores = torch.cat((visual_scores, text_scores), dim=-1) * self.head_dim**-0.5
        text_out = torch.einsum("bhts,bshd->bthd", scores.softmax(dim=-1), v)
        return self.out(torch.cat((v[:, :num_visual], text_out), dim=1).flatten(2))


class PlainVLM(nn.Module):
    """SigLIP features, adapter, decoder, labelled tokens: the mean loss of a padded batch."""

    def __init__(self, sizes: ModelConfig) -> None:
        super().__init__()
        vision, language = sizes.vision, sizes.language
        self.sizes = sizes
        patch = vision.patch_size
        self.patches = nn.Conv2d(3, vision.hidden_size, patch, patch)
        self.positions = nn.Parameter(torch.zeros(vision.num_patches, vision.hidden_size))
        self.vision = nn.Sequential(*(VisionLayer(vision) for _ in range(vision.num_used_layers)))
        self.adapter = nn.Sequential(
            nn.RMSNorm(vision.hidden_size, sizes.adapter.norm_eps),
            nn.Linear(vision.hidden_size, language.hidden_size),
            nn.GELU(),
            nn.Linear(language.hidden_size, language.hidden_size),
        )
        self.rows = nn.Parameter(torch.zeros(sizes.adapter.max_grid, language.hidden_size))
        self.columns = nn.Parameter(torch.zeros(sizes.adapter.max_grid, language.hidden_size))
        self.embedding = nn.Embedding(language.vocab_size, language.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(language) for _ in range(language.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(language.hidden_size, language.rms_norm_eps)
        self.head = nn.Linear(language.hidden_size, language.vocab_size, bias=False)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Mean loss. [B, 3, side, side], int64 [B, T], int64 [B, T] with -100 for no label."""
        visual = self.adapter(self.encode(pixel_values)) + self.grid_positions()
        tokens = torch.cat((visual, self.embedding(input_ids)), dim=1)
        language = self.sizes.language
        places = torch.arange(input_ids.shape[1])
        cos, sin = language.rotary_tables(places, tokens.device)
        for layer in self.layers:
            tokens = layer(tokens, visual.shape[1], (cos, sin))
        labelled = labels != IGNORED_LABEL
        chosen = self.norm(tokens)[:, visual.shape[1] :][labelled]
        return F.cross_entropy(self.head(chosen), labels[labelled])

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Images [B, 3, side, side] as patches [B, patches, hidden], all of the model's dtype."""
        embedded = self.patches(pixel_values).flatten(2).transpose(1, 2)
        return self.vision(embedded + self.positions)

    def grid_positions(self) -> Tensor:
        """A vector per patch, row by row, [patches, hidden] of the model's dtype."""
        rows, columns = self.sizes.vision.grid
        return (self.rows[:rows].unsqueeze(1) + self.columns[:columns]).flatten(0, 1)
