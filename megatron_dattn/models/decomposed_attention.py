"""Decomposed attention as a megatron-core self-attention layer.

The weights are megatron-core's, shared by visual and text tokens and cut over the tensor-parallel
ranks by heads; what happens between the projections is `megatron_dattn.attention`.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_dattn.attention import AttentionConfig
from megatron_dattn.attention.decode import attend_newest
from megatron_dattn.attention.decomposed import attend_scored_tokens, diagonal_attention
from megatron_dattn.attention.positions import apply_rotary
from megatron_dattn.attention.visual_config import num_shared
from megatron_dattn.models.attention_inputs import LayerInputs
from megatron_dattn.models.execution import ExactSavings
from megatron_dattn.models.projections import (
    fold_output_weight,
    project,
    project_queries_keys_values,
)


class DecomposedCore(torch.nn.Module):
    """The attention of this rank's heads, for the tokens that have scores.

    Built as megatron-core builds a `core_attention`; what that is told of scale, masks and context
    parallelism comes with each micro-batch here.
    """

    def __init__(self, config: TransformerConfig, **unused: Any) -> None:
        super().__init__()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor | None,
        head_mask: Tensor | None,
        inputs: LayerInputs,
    ) -> Tensor:
        """[tokens, heads, head_dim] each, query of scored tokens alone -> [scored tokens, heads *
        D]; gate [query heads], head_mask fp32 [key heads]."""
        out = attend_scored_tokens(
            query,
            key,
            value,
            inputs.plan,
            inputs.rotary,
            score_function=inputs.score_function,
            backend=inputs.backend,
            gate=gate,
            head_mask=head_mask,
            elsewhere=inputs.elsewhere,
        )
        return out.flatten(1)


class DecomposedSelfAttention(SelfAttention):
    """Self-attention over packed visual and text tokens, by the micro-batch's plan.

    Args:
        preset: the model's attention. A merge with gates gives the layer the parameter `gate`, one
            number per query head, 0 at first.
        savings: what to leave out.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, preset: AttentionConfig,
        savings: ExactSavings, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(config, *args, **kwargs)
        assert not config.gradient_accumulation_fusion, (
            "it would lose a gradient of a weight that is used twice, see projections.py"
        )
        self.savings = savings
        self.gate: torch.nn.Parameter | None = None
        if preset.has_gate:
            self.gate = _head_parameter(self.num_attention_heads_per_partition, config.params_dtype)
        self.images_are_apart = preset.merge == "cascade"
        self.heads_with_images = num_shared(config.num_query_groups, preset.visual.heads)

    def forward(self, hidden_states: Tensor, inputs: LayerInputs) -> Tensor:
        """Attend and project.

        Args:
            hidden_states: normalized local tokens, [V_r | T_r], [tokens, 1, H], of the model's
                dtype, as the result.
            inputs: plan, rotary tables and backend of the micro-batch.

        Returns:
            What attention adds to the local tokens: to both kinds, or, where visual tokens have no
            attention output, to the text tokens alone.
        """
        if inputs.step is not None:
            return self._decode_step(hidden_states, inputs)
        query, key, value, visual = self._project_in(hidden_states, inputs)
        if not self.images_are_apart:
            inputs.show(self.layer_number, query, key)
        if inputs.cache is not None:
            # Of an image whose tokens a cross-attention has kept, nobody reads these.
            first = inputs.shards.visual if self.images_are_apart else 0
            key, value = inputs.cache.extend(key[first:], value[first:])
        head_mask = self.head_mask(value)
        text = self.core_attention(query, key, value, self.gate, head_mask, inputs)
        if head_mask is not None:
            visual = visual * head_mask.to(visual.dtype).unsqueeze(-1)
        return self._project_out(visual, text, inputs)

    def _decode_step(self, hidden_states: Tensor, inputs: LayerInputs) -> Tensor:
        """As `forward`, of the newest text token of each sample, [samples, 1, H]."""
        step = inputs.step
        assert step is not None
        mixed = project(self.linear_qkv, hidden_states)
        # In every group stand its query heads, then its key, then its value.
        heads = mixed.view(
            len(mixed),
            self.num_query_groups_per_partition,
            -1,
            self.hidden_size_per_attention_head,
        )
        plain = heads[:, :, :-1]
        if self.q_layernorm is not None:
            plain = torch.cat(self._normed(plain[:, :, :-1], plain[:, :, -1:]), dim=2)
        rotated = apply_rotary(plain, step.rotary)
        out = attend_newest(
            (rotated if inputs.rule.attention.t2v.rotary else plain)[:, :, :-1],
            rotated[:, :, :-1],
            None if self.images_are_apart else step.cache.images,
            step.cache.add(rotated[:, :, -1], heads[:, :, -1]),
            step.plan,
            merge=inputs.rule.attention.merge,
            score_function=inputs.score_function,
            backend=step.backend,
            gate=self.gate,
        )
        return project(self.linear_proj, out.view(len(mixed), 1, -1))

    def _project_in(
        self, hidden_states: Tensor, inputs: LayerInputs
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query of the scored tokens, key and value of all that pass, and the values of those whose
        output is their own value."""
        query, key, value, own = self._projected(hidden_states, inputs)
        return *self._normed(query, key), value, own

    def _normed(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Both [..., head_dim] as they are scored, in their dtype: normalized head by head, as
        Qwen3 has it, whatever tokens they are of."""
        if self.q_layernorm is None:
            return query, key
        return self.q_layernorm(query), self.k_layernorm(key)

    def _projected(
        self, hidden_states: Tensor, inputs: LayerInputs
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same as the linear layer makes them."""
        # Not the plan's number of the first one, which counts the tokens of a cache, too.
        first_scored = inputs.shards.num_tokens - inputs.plan.num_scored_tokens
        if self.savings.visual_queries and first_scored:
            return project_queries_keys_values(
                hidden_states,
                self.linear_qkv.weight,
                # Transformer Engine's layers have an empty tensor where there is none.
                self.linear_qkv.bias if self.config.add_qkv_bias else None,
                inputs.shards,
                self.num_query_groups_per_partition,
                self.hidden_size_per_attention_head,
                inputs.plan.num_diagonal_tokens,
            )
        # megatron-core's linear_qkv gathers whole ranks, [V_0 | T_0 | V_1 | T_1 ..]; the plan
        # counts in [V | T].
        mixed = inputs.shards.from_rank_order(project(self.linear_qkv, hidden_states).squeeze(1))
        heads = mixed.unflatten(
            1, (self.num_query_groups_per_partition, -1, self.hidden_size_per_attention_head)
        )
        query, key, value = heads.split((heads.shape[2] - 2, 1, 1), dim=2)
        key, value = key.squeeze(2), value.squeeze(2)
        own = value[: inputs.plan.num_diagonal_tokens]
        query = query.flatten(1, 2)
        # Without a slice there are no zeros for its gradient to be written into.
        return query[first_scored:] if first_scored else query, key, value, own

    def _project_out(self, visual: Tensor, scored: Tensor, inputs: LayerInputs) -> Tensor:
        """From values of diagonal tokens, [tokens, groups, D], and outputs of scored tokens."""
        shards, weight = inputs.shards, self.linear_proj.weight
        if visual.shape[0] and self.savings.folded_output:
            groups, head_dim = visual.shape[1:]
            folded = fold_output_weight(weight, groups, head_dim)
            # What linear_proj would do, with another weight for each kind: the products are sums
            # over this rank's heads, which the ranks add up.
            out = shards.reduce_scatter(visual.flatten(1) @ folded.T, scored @ weight.T)
            return out.unsqueeze(1)
        if visual.shape[0]:
            heads = self.num_attention_heads_per_partition
            scored = torch.cat((diagonal_attention(visual, heads).flatten(1), scored))
        if shards.ranks > 1 and not self.config.fp8:
            # What linear_proj would do, but for the order, which a copy would have to change.
            return shards.reduce_scatter(scored @ weight.T).unsqueeze(1)
        if scored.shape[0] == inputs.plan.num_tokens:
            # linear_proj hands rank r the r-th equal piece, which must be [V_r | T_r]. Text tokens
            # alone are in that order as they are.
            scored = shards.to_rank_order(scored)
        out, _ = self.linear_proj(scored.unsqueeze(1))
        return out

    def head_mask(self, value: Tensor) -> Tensor | None:
        """1 for this rank's key heads that deal with images, 0 for the others, fp32 [key heads], on
        the device of `value`; None if all do.

        The mask says what a model with pruned heads computes; it saves nothing. Scores, keys and
        values of the silent heads are computed, since their softmax still counts visual tokens.
        """
        if self.heads_with_images == self.config.num_query_groups:
            return None
        here = self.num_query_groups_per_partition
        first = self.pg_collection.tp.rank() * here
        heads = torch.arange(first, first + here, device=value.device)
        return (heads < self.heads_with_images).to(torch.float32)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """megatron-core's, and the gate, which is cut over the ranks by heads."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.gate is not None:
            state |= make_sharded_tensors_for_checkpoint(
                {"gate": self.gate},
                prefix,
                {"gate": 0},
                sharded_offsets,
                tp_group=self.pg_collection.tp,
                dp_cp_group=self.pg_collection.dp_cp,
            )
        return state


def _head_parameter(num_heads: int, dtype: torch.dtype) -> torch.nn.Parameter:
    """Zeros, one per query head of this rank, marked as a shard of a longer vector."""
    parameter = torch.nn.Parameter(torch.zeros(num_heads, dtype=dtype))
    # An unmarked parameter counts as a copy of rank 0's, and megatron-core leaves copies out of the
    # gradient norm (`param_is_not_tensor_parallel_duplicate`).
    tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 0, 1)
    return parameter
