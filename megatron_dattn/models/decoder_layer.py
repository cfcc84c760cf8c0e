"""A decoder layer over visual and text tokens: attention, then the FFN, each with its residual.

megatron-core's TransformerLayer brings the modules, their sharding and their checkpoint layout; the
forward pass is ours, because it is here that the two kinds of tokens differ: which of them attend,
which pass the FFN, and which are there at all (`LayerRule`). With the rule of plain presets it is
the language model's own layer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_dattn.attention import AttentionConfig
from megatron_dattn.attention.visual_config import num_shared
from megatron_dattn.models.adapter import VisualProjector
from megatron_dattn.models.attention_inputs import AttentionInputs, LayerInputs
from megatron_dattn.models.cross_attention import ImageCrossAttention
from megatron_dattn.models.execution import ExactSavings
from megatron_dattn.models.projections import gated_activation, gated_ffn
from megatron_dattn.models.recompute import recompute_in_backward

# Local tokens: all of them in one tensor, or visual and text tokens apart.
States = tuple[Tensor, ...]


class DecoderLayer(TransformerLayer):
    """One layer.

    Args:
        preset: the model's attention; "cascade" adds an `ImageCrossAttention`, reprojected visual
            tokens a `VisualProjector`.
        savings: what to leave out.
        feature_size: width of the vision encoder's features.
        last_on_pipeline_stage: whether the next layer belongs to another pipeline stage.
        post_norm: norm of what attention and FFN add to their residuals, for tokens of both kinds,
            as Gemma-2 has it; None for none. What a cross-attention adds passes none: its own
            projection, which starts at zero, sets its size.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *,
        preset: AttentionConfig,
        savings: ExactSavings,
        feature_size: int,
        last_on_pipeline_stage: bool,
        post_norm: type[torch.nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, **kwargs)
        self.preset = preset
        self.savings = savings
        self.last_on_pipeline_stage = last_on_pipeline_stage
        self.post_attention_layernorm = self._post_norm(post_norm)
        self.post_feedforward_layernorm = self._post_norm(post_norm)
        self.visual_projector: VisualProjector | None = None
        if preset.visual.source == "reproject":
            self.visual_projector = VisualProjector(
                config, feature_size=feature_size, norm_eps=config.layernorm_epsilon
            )
        # megatron-core's name for attention over another sequence.
        self.cross_attention: ImageCrossAttention | None = None
        if preset.merge == "cascade":
            self.cross_attention = ImageCrossAttention(
                config,
                ProcessGroupCollection.use_mpu_process_groups(),
                layer_number=self.layer_number,
            )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attention_bias: AttentionInputs,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """The layer's output for this rank's tokens.

        Args:
            hidden_states: local tokens [V_r | T_r], [tokens, 1, H], of the model's dtype; text
                tokens alone where no layer from here on sees images, or images are in the caches.

        Returns:
            The same, without the visual tokens once nobody reads them any more; and None, where
            megatron-core's layers return a context.
        """
        # Under pipeline parallelism layer_number still counts from the decoder's first layer.
        inputs = attention_bias.layer(self.layer_number)
        if not inputs.shards.visual and len(hidden_states) > inputs.shards.local_text:
            # The pipeline stage before may have sent visual tokens, unread, for the shape's sake.
            hidden_states = hidden_states[-inputs.shards.local_text :]
        states = self._transform(self._attend(hidden_states, inputs), inputs)
        return self._emit(states, attention_bias), None

    def _attend(self, hidden_states: Tensor, inputs: LayerInputs) -> States:
        """The attention block with its residual."""
        tokens = hidden_states
        visual, text = inputs.shards.split(tokens)
        if self.visual_projector is not None and visual.shape[0]:
            # For keys and values alone: the residual goes on carrying the encoder's features.
            tokens = torch.cat((self.visual_projector(visual), text))
        normed = self.input_layernorm(tokens)
        # Images may be in the cache while text tokens pass alone.
        if self.cross_attention is not None and inputs.has_images:
            normed_visual, normed_text = inputs.shards.split(normed)
            text = text + self.cross_attention(normed_visual, normed_text, inputs)
            # Text has changed, so it is normalized again; visual tokens have not.
            normed = torch.cat((normed_visual, self.input_layernorm(text)))
            hidden_states = torch.cat((visual, text))
        attended = self.self_attention(normed, inputs)
        if self._recomputes_norms_and_activations and self.cross_attention is None:
            recompute_in_backward(normed, lambda: self.input_layernorm(tokens), attended)
        added = self.post_attention_layernorm(attended)
        if added.shape[0] == hidden_states.shape[0]:
            return (hidden_states + added,)
        # Kept apart: joined they would be copied here and split again for the FFN.
        return visual, text + added

    def _transform(self, states: States, inputs: LayerInputs) -> States:
        """The FFN block with its residual; visual tokens may pass a part of it or none."""
        share = inputs.rule.visual_ffn
        if share == 1.0 or not inputs.shards.visual:
            return (self.ffn(_join(states)),)
        visual, text = states if len(states) == 2 else inputs.shards.split(*states)
        return self.visual_ffn(visual, share), self.ffn(text)

    def visual_ffn(self, visual: Tensor, share: float) -> Tensor:
        """Norm, the first `share` of the FFN's neurons, and residual.

        [tokens, 1, H] -> the same shape and dtype.
        """
        if share == 0.0:
            return visual
        return self._in_chunks(partial(self._part_of_ffn, share=share), visual)

    def ffn(self, tokens: Tensor) -> Tensor:
        """Norm, FFN and residual, [tokens, 1, H] -> the same shape and dtype."""
        return self._in_chunks(self._ffn_of, tokens)

    def _in_chunks(self, function: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """The function of all tokens at once, or of recomputed chunks if the savings say so."""
        # The setting counts tokens of the pack; under sequence parallelism these are a rank's, and
        # the layer's gather makes them the pack's again.
        limit = self.savings.ffn_chunk_tokens // self._token_ranks
        if not 0 < limit < tokens.shape[0]:
            return function(tokens)
        if not (self.training and torch.is_grad_enabled()):
            return torch.cat([function(chunk) for chunk in tokens.split(limit)])
        return torch.cat([self._checkpoint(function, chunk) for chunk in tokens.split(limit)])

    def _ffn_of(self, tokens: Tensor) -> Tensor:
        if torch.is_inference_mode_enabled():
            added = gated_ffn(self.mlp, self.pre_mlp_layernorm(tokens))
        else:
            added = self._norm_and_ffn(tokens)
        return tokens + self.post_feedforward_layernorm(added)

    def _norm_and_ffn(self, tokens: Tensor) -> Tensor:
        """With selective recomputation only gate and up are kept of what lies between tokens and
        sum."""
        normed = self.pre_mlp_layernorm(tokens)
        gate_up, _ = self.mlp.linear_fc1(normed)
        middle = gated_activation(self.mlp, gate_up)
        added, _ = self.mlp.linear_fc2(middle)
        if self._recomputes_norms_and_activations:
            recompute_in_backward(middle, lambda: gated_activation(self.mlp, gate_up), added)
            if normed is not tokens:  # as where Transformer Engine has the norm inside linear_fc1
                recompute_in_backward(normed, lambda: self.pre_mlp_layernorm(tokens), gate_up)
        return added

    def _part_of_ffn(self, tokens: Tensor, share: float) -> Tensor:
        added = _partial_ffn(self.mlp, self.pre_mlp_layernorm(tokens), share)
        return tokens + self.post_feedforward_layernorm(added)

    def _post_norm(self, norm: type[torch.nn.Module] | None) -> torch.nn.Module:
        if norm is None:
            return IdentityOp()
        return norm(
            config=self.config,
            hidden_size=self.config.hidden_size,
            eps=self.config.layernorm_epsilon,
        )

    def _emit(self, states: States, attention: AttentionInputs) -> Tensor:
        """The tokens that the next layer, the next pipeline stage or the head wants."""
        # Behind the last layer the head reads text tokens, or also visual ones where they predict.
        is_last = self.layer_number == len(attention.by_layer)
        unread = self.savings.unread_tokens and not self.preset.visual_tokens_predict
        if attention.reads_images(self.layer_number + 1) or (is_last and not unread):
            return _join(states)
        text = states[-1][-attention.shards.local_text :]
        if is_last or not self.last_on_pipeline_stage:
            return text
        # Stages exchange tensors of one fixed shape.
        return torch.cat((text.new_zeros(attention.shards.local_visual, *text.shape[1:]), text))

    @property
    def _recomputes_norms_and_activations(self) -> bool:
        # They are kept for the gradients of weights alone.
        trained = self.mlp.linear_fc2.weight.requires_grad
        return trained and self.config.recompute_granularity == "selective"

    @property
    def _token_ranks(self) -> int:
        return self.tp_group.size() if self.config.sequence_parallel else 1

    def _checkpoint(self, function: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        if self.config.fp8:
            # Transformer Engine must know which forward pass is a repetition: FP8 tensors are
            # scaled by what was seen before, and the repetition must use the first pass's scales.
            from megatron.core.extensions.transformer_engine import te_checkpoint

            tracker = tensor_parallel.random.get_cuda_rng_tracker
            return te_checkpoint(function, False, tracker, self.tp_group, tokens)
        return tensor_parallel.checkpoint(function, False, tokens)


def _join(states: States) -> Tensor:
    return states[0] if len(states) == 1 else torch.cat(states)


def _partial_ffn(mlp: MLP, normed: Tensor, share: float) -> Tensor:
    """What the first `share` of the neurons adds to some tokens (YOPO).

    Which neurons these are must not depend on how the weights are cut: under tensor parallelism the
    low ranks hold the first ones and do the work, the others may have none.

    Args:
        mlp: the layer's gated FFN without biases; its first weight is `[gate; up]` on every rank.
        normed: normalized local tokens, [tokens, 1, H], equally many on every rank.

    Returns:
        Shaped like `normed`.
    """
    config, group = mlp.config, mlp.tp_group
    here = mlp.linear_fc2.weight.shape[1]
    used = num_shared(config.ffn_hidden_size, share) - group.rank() * here
    # A rank that holds none of them goes on with empty matrices: it takes part in the collectives.
    used = max(0, min(used, here))
    # The rank's rows are [its gate; its up], not a slice of [gate; up] (partition_stride 2).
    gate, up = (half[:used] for half in mlp.linear_fc1.weight.chunk(2))
    if config.sequence_parallel:
        tokens = gather_from_sequence_parallel_region(normed, group=group)
    else:
        # The same tensor; in the backward pass the ranks' gradients are summed, because each has
        # those of its own neurons.
        tokens = copy_to_tensor_model_parallel_region(normed, group=group)
    middle = mlp.activation_func(tokens @ gate.T) * (tokens @ up.T)
    partial = middle @ mlp.linear_fc2.weight[:, :used].T
    if config.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(partial, group=group)
    return reduce_from_tensor_model_parallel_region(partial, group=group)
