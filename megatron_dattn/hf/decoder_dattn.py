"""The language model's layers over two kinds of tokens: text tokens (T) and visual tokens (V).

Visual tokens of an image depend on that image alone: a layer adds to each its own value (V2V
diagonal) and its FFN, and no token of another image or of the text. So `DecoderLayer.images` runs
over images without any text, and `DecoderLayer.forward` runs over text tokens that read the keys
and values which the images left. Layers are Mistral's, Llama's and Qwen's, or Gemma-2's; parameters
have their names in Hugging Face's models.

This file travels with the exported weights.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .attention_dattn import Attention, CrossAttention, KeyValue, Rotary, Seen
from .caches_dattn import DAttnCache
from .configuration_dattn import DAttnConfig
from .norms_dattn import decoder_norm
from .vision_dattn import FeatureMLP


class GatedMLP(nn.Module):
    """The FFN."""

    def __init__(self, config: DAttnConfig) -> None:
        super().__init__()
        text = config.text_config
        self.gate_proj = nn.Linear(text.hidden_size, text.intermediate_size, bias=False)
        self.up_proj = nn.Linear(text.hidden_size, text.intermediate_size, bias=False)
        self.down_proj = nn.Linear(text.intermediate_size, text.hidden_size, bias=False)
        self.activation = ACT2FN[text.hidden_activation if config.is_gemma2 else text.hidden_act]

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., hidden] -> the same shape and dtype."""
        return self.down_proj(self.activation(self.gate_proj(tokens)) * self.up_proj(tokens))


class DecoderLayer(nn.Module):
    """One layer.

    Gemma-2 norms what attention and FFN add, too, and has another name for the norm in front of the
    FFN. What a cross-attention adds passes no norm.
    """

    def __init__(self, config: DAttnConfig, number: int) -> None:
        super().__init__()
        text = config.text_config
        self.self_attn = Attention(config, number)
        self.mlp = GatedMLP(config)
        self.input_layernorm = decoder_norm(config)
        self.post_attention_layernorm = decoder_norm(config)
        self.has_post_norms = config.is_gemma2
        if self.has_post_norms:
            self.pre_feedforward_layernorm = decoder_norm(config)
            self.post_feedforward_layernorm = decoder_norm(config)
        self.cross_attn = CrossAttention(config) if config.merge == "cascade" else None
        self.visual_projector: FeatureMLP | None = None
        if config.visual_source == "reproject":
            width = config.vision_config.hidden_size, text.hidden_size, text.hidden_size
            self.visual_projector = FeatureMLP(*width, norm_eps=text.rms_norm_eps)
        is_last = number == text.num_hidden_layers - 1
        self.gradient_checkpointing = False  # transformers sets it on whatever has it
        self.changes_images = not is_last and self.visual_projector is None
        self.adds_own_values = config.v2v == "diagonal"

    def images(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Key, value and new state of images' tokens, [images, tokens, hidden], in their dtype.

        The last layer leaves the state as it is: no one reads it. So does a layer that makes tokens
        of its own from the encoder's features, which are the state then.
        """
        own = tokens if self.visual_projector is None else self.visual_projector(tokens)
        normed = self.input_layernorm(own)
        key, value = self.self_attn.keys_values(normed)
        if self.changes_images and self.adds_own_values:
            tokens = self._add(tokens, self.self_attn.own_values(value))
        if self.changes_images:
            tokens = self._transform(tokens)
        if self.cross_attn is not None:
            key, value = self.cross_attn.keys_values(normed)
        return key, value, tokens

    def forward(
        self, tokens: Tensor, rotary: Rotary, images: KeyValue, seen: Seen, cache: DAttnCache | None
    ) -> Tensor:
        """New state of text tokens, [batch, tokens, hidden], same dtype; arguments as of
        `Attention`."""
        if self.cross_attn is not None:
            tokens = tokens + self.cross_attn(self.input_layernorm(tokens), images, seen)
        normed = self.input_layernorm(tokens)
        return self._transform(
            self._add(tokens, self.self_attn(normed, rotary, images, seen, cache))
        )

    def _add(self, tokens: Tensor, attended: Tensor) -> Tensor:
        return tokens + (
            self.post_attention_layernorm(attended) if self.has_post_norms else attended
        )

    def _transform(self, tokens: Tensor) -> Tensor:
        if not self.has_post_norms:
            return tokens + self.mlp(self.post_attention_layernorm(tokens))
        return tokens + self.post_feedforward_layernorm(
            self.mlp(self.pre_feedforward_layernorm(tokens))
        )


class LanguageModel(nn.Module):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: DAttnConfig) -> None:
        super().__init__()
        text = config.text_config
        self.embed_tokens: nn.Module = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers: Any = nn.ModuleList(
            DecoderLayer(config, number) for number in range(text.num_hidden_layers)
        )
        self.norm = decoder_norm(config)
        self.scale = text.hidden_size**0.5 if config.is_gemma2 else None

    def scaled(self, tokens: Tensor) -> Tensor:
        """Tokens [..., hidden] as they enter the first layer: Gemma-2 multiplies by
        sqrt(hidden_size), rounded to the tokens' dtype. It was trained so with visual tokens as
        with embeddings."""
        if self.scale is None:
            return tokens
        return tokens * torch.tensor(self.scale, dtype=torch.float32).to(tokens)
