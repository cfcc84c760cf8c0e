"""Decomposed attention as a megatron-core self-attention layer.

The projections are megatron-core's, shared by visual and text rows and cut over the tensor-parallel
ranks by heads; what happens between them is `megatron_dattn.attention`. Everything that depends on
the micro-batch alone arrives in one object through the `attention_bias` argument: the only one that
TransformerBlock hands to every layer untouched, also inside recomputation, where it travels in a
closure.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_dattn.attention import (
    AttentionPlan,
    Backend,
    ReportPlan,
    Scoring,
    decomposed_attention,
)
from megatron_dattn.models.observer import AttentionObserver


@dataclass(frozen=True)
class AttentionInputs:
    """What every layer's attention needs to know about the micro-batch."""

    plan: AttentionPlan
    rotary: tuple[Tensor, Tensor]
    """Cosine and sine of every packed row's position, each [S, head_dim]."""
    backend: Backend
    observer: AttentionObserver | None = None
    """Who is shown every layer's queries and keys; None in nearly every step."""
    report: ReportPlan | None = None
    """For the observer: the same attention, taken apart."""


class DecomposedCore(torch.nn.Module):
    """The attention of this rank's heads over all packed rows.

    Built as megatron-core builds a `core_attention`; arguments that describe masks or context
    parallelism have no meaning here.
    """

    def __init__(
        self, config: TransformerConfig, softmax_scale: float | None = None, **unused: Any
    ) -> None:
        super().__init__()
        assert config.kv_channels is not None, "TransformerConfig fills kv_channels in"
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention: AttentionInputs
    ) -> Tensor:
        """[S, heads, head_dim] each, key and value with fewer heads -> [S, 1, heads * head_dim]."""
        out = decomposed_attention(
            query,
            key,
            value,
            attention.plan,
            attention.rotary,
            scale=self.scale,
            backend=attention.backend,
        )
        return out.reshape(out.shape[0], 1, -1)


class DecomposedSelfAttention(SelfAttention):
    """Self-attention over packed visual and text rows, by the micro-batch's plan."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attention_bias: AttentionInputs,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend and project.

        Args:
            hidden_states: normalized rows, [S, 1, H]; [S / tensor-parallel size, 1, H] under
                sequence parallelism, where the projections gather and scatter them.
            attention_bias: the micro-batch's plan, rotary tables and backend.

        Returns:
            The projected output, shaped like `hidden_states`, and its bias (None).
        """
        query, key, value = (
            states.squeeze(1) for states in self.get_query_key_value_tensors(hidden_states)
        )

        if attention_bias.observer is not None:
            self._show(attention_bias.observer, query, key, attention_bias)

        def core(*states: Tensor) -> Tensor:
            return self.core_attention(*states, attention_bias)

        if self.checkpoint_core_attention and self.training:
            out = tensor_parallel.checkpoint(core, False, query, key, value)
        else:
            out = core(query, key, value)
        return self.linear_proj(out)

    @torch.no_grad()
    def _show(
        self, observer: AttentionObserver, query: Tensor, key: Tensor, attention: AttentionInputs
    ) -> None:
        """Show the layer's projections to an observer; full recomputation does so twice."""
        assert attention.report is not None, "an observer comes with a report's plan"
        scoring = Scoring(
            attention.report, attention.rotary, self.core_attention.scale, attention.backend
        )
        observer(self.layer_number, query.detach(), key.detach(), scoring)
