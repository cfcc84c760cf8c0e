"""The language model: megatron-core's GPTModel with tokens in and labelled tokens out.

GPTModel brings the modules, their sharding over ranks and their checkpoint layout. Its forward pass
assumes one token sequence with rotary positions of its own; here the tokens arrive embedded, the
positions come with the attention plan, and the head runs on the labelled text tokens alone.
"""

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from torch import Tensor

from megatron_dattn.attention import AttentionConfig
from megatron_dattn.models.attention_inputs import AttentionInputs
from megatron_dattn.models.config import LanguageConfig
from megatron_dattn.models.execution import ExactSavings
from megatron_dattn.models.layer_specs import Implementation, language_block_spec
from megatron_dattn.parallel.sequence import SequenceLayout


class DAttnLanguageModel(GPTModel):
    """A decoder over packed visual and text tokens.

    Args:
        config: from `language_transformer_config`.
        language: sizes.
        implementation: whose linear layers and norms to use.
        preset: which tokens see which.
        savings: what to leave out.
        feature_size: width of the vision encoder's features.
        pre_process: this pipeline stage has the embedding.
        post_process: this pipeline stage has the head.
        chunk: of this pipeline rank's layers, where it has several groups of them; else None.
    """

    def __init__(
        self,
        config: TransformerConfig,
        language: LanguageConfig,
        implementation: Implementation,
        *,
        preset: AttentionConfig,
        savings: ExactSavings,
        feature_size: int,
        pre_process: bool = True,
        post_process: bool = True,
        chunk: int | None = None,
    ) -> None:
        num_layers = get_num_layers_to_build(config, chunk)
        super().__init__(
            config=config,
            transformer_layer_spec=language_block_spec(
                implementation,
                num_layers,
                language=language,
                preset=preset,
                savings=savings,
                feature_size=feature_size,
            ),
            vocab_size=language.padded_vocab_size,
            max_sequence_length=0,  # read by learned absolute positions only
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=language.tie_word_embeddings,
            position_embedding_type="none",  # GPTModel's rotary tables count one sequence of text
            # Tokens are scattered after the visual ones have joined them.
            scatter_embedding_sequence_parallel=False,
            vp_stage=chunk,
        )
        self.language = language
        if post_process:
            # The head's input is not sharded by tokens: `SequenceLayout.take` has gathered it. So
            # it must not gather again, and must all-reduce the gradient of its input, since every
            # rank has that of its own slice of the vocabulary. ColumnParallelLinear decides both
            # from `config.sequence_parallel` alone.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = config.tensor_model_parallel_size > 1

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings, int64 [tokens] -> [tokens, 1, H] of the model's dtype, equal on every
        tensor-parallel rank."""
        return self.embedding(input_ids=input_ids.unsqueeze(0), position_ids=None)

    @torch.no_grad()
    def embedding_deviation(self) -> float:
        """Standard deviation of the tokens' embeddings, unscaled; equal on every tensor-parallel
        rank, which must call it together."""
        table: Tensor = self.embedding.word_embeddings.weight
        first = self.pg_collection.tp.rank() * table.shape[0]
        rows = table[: max(0, self.language.vocab_size - first)]
        # fp64: a variance as a difference of sums over millions of entries needs the digits.
        sums = torch.zeros(3, dtype=torch.float64, device=table.device)
        for block in rows.split(4096):  # not the whole table in another precision at once
            exact = block.double()
            sums += torch.stack((torch.ones_like(exact).sum(), exact.sum(), exact.square().sum()))
        torch.distributed.all_reduce(sums, group=self.pg_collection.tp)
        count, total, squares = sums.tolist()
        return float((squares / count - (total / count) ** 2) ** 0.5)

    def scale_tokens(self, tokens: Tensor) -> Tensor:
        """These tokens in the family's scale, [tokens, 1, H], same dtype, for the first layer.

        Gemma-2 multiplies embeddings by sqrt(H), rounded to their dtype. Visual tokens are
        multiplied like text tokens, so the adapter's output stands beside the embedding table's
        entries.
        """
        if self.language.embedding_scale == 1.0:
            return tokens
        # Through float32, as Hugging Face keeps the factor.
        factor, device = self.language.embedding_scale, tokens.device
        return tokens * torch.full((), factor, dtype=torch.float32, device=device).to(tokens)

    def forward(self, decoder_input: Tensor | None, attention: AttentionInputs) -> Tensor:
        """Run this pipeline stage's layers.

        Args:
            decoder_input: scaled tokens, [S, 1, H], of the model's dtype (under sequence
                parallelism this rank's share of them); None on pipeline stages after the first,
                which use what `set_input_tensor` was given.
            attention: what the layers need to know about the micro-batch.

        Returns:
            Hidden states of the input's shape and dtype; on the last pipeline stage after the final
            norm, and of the text tokens alone if nobody reads the visual ones.
        """
        # In `attention_bias`, because TransformerBlock passes that on to its layers untouched:
        # under full recomputation masks and rotary tables go through an autograd.Function that
        # takes tensors alone, this one through a closure (`_checkpointed_forward`).
        return self.decoder(
            hidden_states=decoder_input, attention_mask=None, attention_bias=attention
        )

    def logits(self, hidden_states: Tensor, tokens: Tensor, shards: SequenceLayout) -> Tensor:
        """This rank's share of the vocabulary's logits at the chosen tokens.

        Args:
            hidden_states: of the last pipeline stage, local tokens of both kinds or text tokens
                alone, [tokens, 1, H], of the model's dtype.
            tokens: packed tokens, int64 [N].
            shards: how the tokens are spread over the ranks.

        Returns:
            [N, padded_vocab_size / tensor-parallel size], of the model's dtype; -inf where there is
            no token
        """
        chosen = shards.take(hidden_states, tokens)
        shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if shared else None
        logits, _ = self.output_layer(chosen.squeeze(1), weight=weight)
        softcap = self.language.final_logit_softcapping
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return self._without_padding(logits)

    def _without_padding(self, logits: Tensor) -> Tensor:
        """Tokens of the head behind the vocabulary must neither win nor count in the softmax."""
        language, here = self.language, logits.shape[1]
        first = self.pg_collection.tp.rank() * here
        valid = max(0, min(here, language.vocab_size - first))
        if valid == here:
            return logits
        padding = logits.new_full((logits.shape[0], here - valid), -torch.inf)
        return torch.cat((logits[:, :valid], padding), dim=1)

    def gathered_logits(
        self, hidden_states: Tensor, tokens: Tensor, shards: SequenceLayout
    ) -> Tensor:
        """Logits over the whole vocabulary on every tensor-parallel rank.

        Arguments as of `logits`, hidden states [tokens, 1, H] of the model's dtype and tokens int64
        [N], and [N, vocab_size] of that dtype returned.
        """
        logits = gather_from_tensor_model_parallel_region(
            self.logits(hidden_states, tokens, shards), group=self.pg_collection.tp
        )
        return logits[:, : self.language.vocab_size]

    def losses(
        self, hidden_states: Tensor, tokens: Tensor, labels: Tensor, shards: SequenceLayout
    ) -> Tensor:
        """Cross entropy of each label, fp32 [N].

        Args:
            hidden_states: of the last pipeline stage, [tokens, 1, H], of the model's dtype.
            tokens: packed token that predicts each label, int64 [N].
            labels: token ids, int64 [N].
            shards: how the tokens are spread over the ranks.

        With N = 0 the result is empty but hangs on the whole graph: its sum's backward pass gives
        every parameter a zero gradient, so that data-parallel reductions stay in step.
        """
        num_labels = labels.shape[0]
        if num_labels == 0:  # some text token with some label
            tokens, labels = tokens.new_full((1,), shards.visual), labels.new_zeros(1)
        logits = self.logits(hidden_states, tokens, shards)
        if self.config.tensor_model_parallel_size > 1:
            # Computes in fp32, and in place where the logits are fp32 already: they are gone then.
            losses = vocab_parallel_cross_entropy(logits, labels)
        else:
            # On one rank torch's own, which also takes fp64, as the tests use.
            dtype = torch.promote_types(logits.dtype, torch.float32)
            losses = F.cross_entropy(logits.to(dtype), labels, reduction="none")
        return losses if num_labels else losses[:0]
