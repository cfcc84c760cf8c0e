"""One decoder layer's two kinds of rows apart: images without text, text with images behind it.

`DecoderLayer.forward` passes visual and text rows together, which is what training needs. Here an
image passes a layer alone and leaves the keys and values that text reads of it, and text rows pass
with keys and values in place of the rows they came from. The modules are the layer's own; the
generator has one process, so no rows are spread over ranks.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_dattn.attention import LayerRule, diagonal_attention
from megatron_dattn.models.attention_inputs import LayerInputs
from megatron_dattn.models.decoder_layer import DecoderLayer
from megatron_dattn.models.decomposed_attention import DecomposedSelfAttention

KeyValue = tuple[Tensor, Tensor]
"""Of the same rows, [rows, key heads, head_dim] each, without rotation."""


class LayerMemory:
    """Keys and values of a layer's rows, [visual | text so far]."""

    def __init__(self, rows: Iterable[KeyValue] = ()) -> None:
        """
        Args:
            rows: what is known before the first text row.
        """
        self._pieces = list(rows)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Remember more rows."""
        self._pieces.append((key, value))

    def all_rows(self) -> KeyValue:
        """Everything that was remembered, in the order of remembering."""
        if len(self._pieces) > 1:
            keys, values = zip(*self._pieces, strict=True)
            self._pieces = [(torch.cat(keys), torch.cat(values))]
        return self._pieces[0]


def pass_images(layer: DecoderLayer, rows: Tensor, rule: LayerRule) -> tuple[KeyValue, Tensor]:
    """What text will read of visual rows that attend to nothing but themselves.

    Args:
        rows: visual rows of any images, [rows, 1, H].
        rule: the layer's; it sees images.

    Returns:
        The rows' keys and values (those of the cross-attention, where it is what reads images), and
        the rows as the next layer gets them.
    """
    assert not rule.attention.scores_visual_rows
    attention = layer.self_attention
    source = rows if layer.visual_projector is None else layer.visual_projector(rows)
    normed = layer.input_layernorm(source)
    _, key, value = _project(attention, normed)
    if layer.cross_attention is None:
        left = key, value
    else:
        left = layer.cross_attention.keys_values(normed)
    if rule.attention.v2v == "diagonal":
        rows = rows + layer.post_attention_layernorm(_own_values(attention, value))
    return left, layer.visual_ffn(rows, rule.visual_ffn)


def pass_text(
    layer: DecoderLayer, rows: Tensor, inputs: LayerInputs, memory: LayerMemory
) -> Tensor:
    """The layer's output for new text rows, [rows, 1, H]; their keys and values are remembered.

    Args:
        inputs: a plan whose scored rows are the new ones, and whose other rows are remembered.
    """
    attention = layer.self_attention
    normed = layer.input_layernorm(rows)
    if layer.cross_attention is not None and inputs.plan.visual_parts:
        rows = rows + layer.cross_attention.read(normed, *memory.all_rows(), inputs)
        normed = layer.input_layernorm(rows)
    query, key, value = _project(attention, normed)
    memory.append(key, value)
    out = attention.core_attention(
        query, *memory.all_rows(), attention.gate, attention.head_mask(value), inputs
    )
    added, _ = attention.linear_proj(out.unsqueeze(1))
    return layer.ffn(rows + layer.post_attention_layernorm(added))


def _project(attention: DecomposedSelfAttention, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, [rows, heads, head_dim] each."""
    query, key, value = attention.get_query_key_value_tensors(normed)
    return query.squeeze(1), key.squeeze(1), value.squeeze(1)


def _own_values(attention: DecomposedSelfAttention, value: Tensor) -> Tensor:
    """Equation 2 and the output projection, [rows, 1, H]."""
    mask = attention.head_mask(value)
    if mask is not None:
        value = value * mask.to(value.dtype).unsqueeze(-1)
    heads = diagonal_attention(value, attention.num_attention_heads_per_partition)
    out, _ = attention.linear_proj(heads.flatten(1).unsqueeze(1))
    return out
