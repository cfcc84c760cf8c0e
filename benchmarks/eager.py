"""Conventional attention as plain PyTorch: the setting that the paper's speed-up refers to.

As in Hugging Face's eager Mistral, keys and values are repeated for every query head, the scores of
all pairs stand in memory in the run's dtype, an additive mask hides the later tokens, the softmax
is taken in fp32, and autograd's own backward pass keeps what it needs. It stands here because it is
measured, not because anybody should train with it.
"""

import torch
from torch import Tensor

from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.positions import apply_rotary
from megatron_dattn.models.attention_inputs import LayerInputs


class EagerCore(torch.nn.Module):
    """Stands in for the engine's `DecomposedCore` in a layer with the preset `s_attn`.

    Args:
        layout: of one sample, without padding.
        device, dtype: of the mask, which is made once, as for all layers of a model.
        scale: of the scores.
    """

    def __init__(
        self, layout: TokenLayout, device: torch.device, dtype: torch.dtype, scale: float
    ) -> None:
        super().__init__()
        assert layout.num_samples == 1
        assert layout.num_visual_tokens + layout.num_text_tokens == layout.num_tokens
        runs = layout.runs(0)
        self.scale = scale
        self.reading_order = torch.cat([torch.arange(r.start, r.end) for r in runs]).to(device)
        self.packed_order = self.reading_order.argsort()
        tokens = layout.num_tokens
        self.mask = torch.full((tokens, tokens), -torch.inf, device=device, dtype=dtype).triu_(1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor | None,
        head_mask: Tensor | None,
        inputs: LayerInputs,
    ) -> Tensor:
        """Query [S, heads, head_dim], the others with fewer heads; [S, H] of the same dtype."""
        assert gate is None, "s_attn has no gates"
        assert head_mask is None, "s_attn masks no heads"
        query, key = apply_rotary(query, inputs.rotary), apply_rotary(key, inputs.rotary)
        group = query.shape[1] // key.shape[1]
        q, k, v = (tokens[self.reading_order].transpose(0, 1) for tokens in (query, key, value))
        k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
        scores = torch.matmul(q, k.mT) * self.scale + self.mask
        probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        out = torch.matmul(probabilities, v).transpose(0, 1)[self.packed_order]
        return out.flatten(1)
