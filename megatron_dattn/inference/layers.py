"""One decoder layer's two kinds of tokens apart: images without text, text with images behind it.

`DecoderLayer.forward` passes visual and text tokens together, which is what training needs. Here an
image passes a layer alone and leaves the keys and values that text reads of it, and text tokens
pass with keys and values in place of the tokens they came from. The modules are the layer's own;
the generator has one process, so no tokens are spread over ranks.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_dattn.attention import LayerRule, diagonal_attention
from megatron_dattn.models.attention_inputs import LayerInputs
from megatron_dattn.models.decoder_layer import DecoderLayer
from megatron_dattn.models.decomposed_attention import DecomposedSelfAttention

KeyValue = tuple[Tensor, Tensor]
"""Of the same tokens, [tokens, key heads, head_dim] each, without rotation."""


class LayerKVCache:
    """Keys and values of a layer's tokens, [visual | text so far]."""

    def __init__(self, tokens: Iterable[KeyValue] = ()) -> None:
        """
        Args:
            tokens: what is known before the first text token.
        """
        self._pieces = list(tokens)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Remember more tokens."""
        self._pieces.append((key, value))

    def all_tokens(self) -> KeyValue:
        """Everything that was remembered, in the order of remembering."""
        if len(self._pieces) > 1:
            keys, values = zip(*self._pieces, strict=True)
            self._pieces = [(torch.cat(keys), torch.cat(values))]
        return self._pieces[0]


def pass_images(layer: DecoderLayer, tokens: Tensor, rule: LayerRule) -> tuple[KeyValue, Tensor]:
    """What text will read of visual tokens that attend to nothing but themselves.

    Args:
        tokens: visual tokens of any images, [tokens, 1, H].
        rule: the layer's; it sees images.

    Returns:
        The tokens' keys and values (those of the cross-attention, where it is what reads images),
        and the tokens as the next layer gets them.
    """
    assert not rule.attention.scores_visual_tokens
    attention = layer.self_attention
    source = tokens if layer.visual_projector is None else layer.visual_projector(tokens)
    normed = layer.input_layernorm(source)
    _, key, value = _project(attention, normed)
    if layer.cross_attention is None:
        left = key, value
    else:
        left = layer.cross_attention.keys_values(normed)
    if rule.attention.v2v == "diagonal":
        tokens = tokens + layer.post_attention_layernorm(_own_values(attention, value))
    return left, layer.visual_ffn(tokens, rule.visual_ffn)


def pass_text(
    layer: DecoderLayer, tokens: Tensor, inputs: LayerInputs, cache: LayerKVCache
) -> Tensor:
    """The layer's output for new text tokens, [tokens, 1, H]; their keys and values are remembered.

    Args:
        inputs: a plan whose scored tokens are the new ones, and whose other tokens are remembered.
    """
    attention = layer.self_attention
    normed = layer.input_layernorm(tokens)
    if layer.cross_attention is not None and inputs.plan.visual_parts:
        tokens = tokens + layer.cross_attention.read(normed, *cache.all_tokens(), inputs)
        normed = layer.input_layernorm(tokens)
    query, key, value = _project(attention, normed)
    cache.append(key, value)
    out = attention.core_attention(
        query, *cache.all_tokens(), attention.gate, attention.head_mask(value), inputs
    )
    added, _ = attention.linear_proj(out.unsqueeze(1))
    return layer.ffn(tokens + layer.post_attention_layernorm(added))


def _project(attention: DecomposedSelfAttention, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, [tokens, heads, head_dim] each."""
    query, key, value = attention.get_query_key_value_tensors(normed)
    return query.squeeze(1), key.squeeze(1), value.squeeze(1)


def _own_values(attention: DecomposedSelfAttention, value: Tensor) -> Tensor:
    """Equation 2 and the output projection, [tokens, 1, H]."""
    mask = attention.head_mask(value)
    if mask is not None:
        value = value * mask.to(value.dtype).unsqueeze(-1)
    heads = diagonal_attention(value, attention.num_attention_heads_per_partition)
    out, _ = attention.linear_proj(heads.flatten(1).unsqueeze(1))
    return out
