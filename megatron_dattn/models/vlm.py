"""The vision-language model: images and text in, losses of labelled text tokens out.

Images are encoded, adapted to the language model's width and placed in front of the text as tokens
of one packed tensor; the decoder treats tokens of both kinds alike except in its attention. Vision
encoder and adapter exist on the first pipeline stage only, the head on the last. Every pipeline
stage derives the attention plan from the layout, so every pipeline stage needs the batch (only the
first its pixels).
"""

from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_dattn.attention.backends.select import select_backend
from megatron_dattn.attention.layers import layer_rules, output_tokens
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.reading_order import ReadingOrder, knows_one_kind, reading_order
from megatron_dattn.attention.transfer import to_device
from megatron_dattn.batch import PackedBatch
from megatron_dattn.models.adapter import Adapter, build_adapter, features_as_tokens
from megatron_dattn.models.attention_inputs import AttentionInputs, prepare_attention
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.models.language_model import DAttnLanguageModel
from megatron_dattn.models.layer_specs import resolve_implementation, vision_block_spec
from megatron_dattn.models.observer import AttentionObserver
from megatron_dattn.models.patch_selection import most_attended, take_patches
from megatron_dattn.models.transformer_config import (
    language_transformer_config,
    vision_transformer_config,
)
from megatron_dattn.models.vision_encoder import VisionEncoder
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.parallel.context.exchange import ContextExchange
from megatron_dattn.parallel.context.shares import share_of
from megatron_dattn.parallel.context.softmax import ImagesOfAllRanks, share_gradient
from megatron_dattn.parallel.sequence import SequenceLayout


class ImageFeatures(NamedTuple):
    """What `DAttnVLM.encode` hands to `DAttnVLM.adapt`."""

    patches: Tensor
    """[images, patches, F], of one blank image where the pack has none."""
    kept: Tensor | None
    """Which patches of each image these are, int64 [images, patches]; None if all."""
    num_images: int
    """Of the pack; 0 where `patches` are those of a blank image."""


class DAttnVLM(MegatronModule):
    """One pipeline stage of the vision-language model.

    Args:
        model: sizes and the attention preset.
        parallel: layout over ranks; megatron-core's process groups must exist.
        execution: precision, recomputation, implementations.
        pre_process: this pipeline stage has the vision encoder, the embedding and, unless every
            layer projects the features anew, the adapter.
        post_process: this pipeline stage has the head.
        chunk: of this pipeline rank's layers, where it has several groups of them; else None.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        execution: ExecutionConfig,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        chunk: int | None = None,
    ) -> None:
        # The outermost module's config is what megatron-core's schedules and DDP read.
        super().__init__(config=language_transformer_config(model.language, parallel, execution))
        self.model_config = model
        self.attention = model.preset
        self.attention_backend = execution.attention_backend
        self.labelled_logits = execution.savings.labelled_logits
        self.pre_process = pre_process
        self.post_process = post_process
        # What megatron-core's schedules and gradient finalization ask of a model.
        self.model_type = ModelType.encoder_or_decoder
        self.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.share_embeddings_and_output_weights = model.language.tie_word_embeddings
        # Of context-parallel ranks; None where each has all images.
        self.exchange: ContextExchange | None = None
        if self.pg_collection.cp.size() > 1:
            self.exchange = ContextExchange(self.pg_collection.cp)

        implementation = resolve_implementation(execution)
        self.vision_model: VisionEncoder | None = None
        self.adapter: Adapter | None = None
        if pre_process:
            vision_config = vision_transformer_config(model.vision, parallel, execution)
            layers = vision_block_spec(implementation, vision_config.num_layers)
            self.vision_model = VisionEncoder(vision_config, model.vision, layers)
            self.adapter = build_adapter(vision_config, model)
        self.rules = layer_rules(
            self.attention,
            model.language.num_hidden_layers,
            skip_unread=execution.savings.unread_tokens,
        )
        self.knows_one_kind = knows_one_kind(self.attention, self.rules)
        self.language_model = DAttnLanguageModel(
            self.config,
            model.language,
            implementation,
            preset=self.attention,
            savings=execution.savings,
            feature_size=model.vision.hidden_size,
            pre_process=pre_process,
            post_process=post_process,
            chunk=chunk,
        )

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> ShardedStateDict:
        """megatron-core's, without what linear layers keep besides weights.

        Local ones keep nothing. Transformer Engine's keep the scales of delayed FP8 scaling, as a
        pickle that from 2.16.1 on it refuses to load; they are measured anew in the first step.
        """
        state = super().sharded_state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if not key.endswith("_extra_state")}

    def forward(self, batch: PackedBatch, observer: AttentionObserver | None = None) -> Tensor:
        """One micro-batch through this pipeline stage.

        Args:
            batch: tensors on this rank's device; under context parallelism its own share of the
                images (`take_share`). `pixel_values` is read on the first pipeline stage only.
            observer: is shown the queries and keys of every layer of this pipeline stage.

        Returns:
            Hidden states [S, 1, H] (this rank's share of the tokens under sequence parallelism) on
            pipeline stages before the last; there, the fp32 loss of every labelled text token, in
            token order. A batch without labels gives an empty vector that is still connected to the
            graph. Context-parallel ranks give the same losses, and gradients that sum to the whole.
        """
        order = reading_order(batch.layout) if self.knows_one_kind else None
        attention = self.attention_inputs(
            batch.layout, batch.input_ids.device, observer, order, whole=batch.whole
        )
        features = self.encode(batch.pixel_values)
        visual = self.adapt(features)
        hidden_states = self.decode(visual, batch, attention)
        return self.loss(hidden_states, batch, attention) if self.post_process else hidden_states

    def forward_logits(
        self, batch: PackedBatch, tokens: Tensor, observer: AttentionObserver | None = None
    ) -> Tensor:
        """Next-token logits at chosen packed tokens, for generation and evaluation.

        Args:
            batch: as for `forward`; its labels are not read.
            tokens: packed tokens, int64 [N], equal on every rank: of those that `output_tokens`
                names.
            observer: as for `forward`.

        Returns:
            [N, vocab_size], of the model's dtype, on the last pipeline stage, hidden states on the
            others.
        """
        attention = self.attention_inputs(batch.layout, batch.input_ids.device, observer)
        visual = self.adapt(self.encode(batch.pixel_values))
        hidden_states = self.decode(visual, batch, attention)
        if not self.post_process:
            return hidden_states
        return self.language_model.gathered_logits(hidden_states, tokens, attention.shards)

    def encode(self, pixel_values: Tensor) -> ImageFeatures | None:
        """Features of the patches that enter the decoder.

        Args:
            pixel_values: [images, 3, image_size, image_size], any floating dtype; maybe no images.

        Returns:
            None on pipeline stages after the first, and where there is neither an image nor a
            parameter that it would train.
        """
        if self.vision_model is None:
            return None
        num_images, train_vision = pixel_values.shape[0], _is_trained(self.vision_model)
        if num_images == 0:
            if not (train_vision or (self.adapter is not None and _is_trained(self.adapter))):
                return None
            # Under overlap_grad_reduce megatron-core sends a bucket of gradients off when every
            # parameter in it has had its backward hook. A parameter that is not in this rank's
            # graph has none: `finish_grad_sync` stops here, and the other ranks wait for it. So a
            # blank image stands in, whose tokens `adapt` drops: its gradients are zeros.
            side = self.model_config.vision.image_size
            pixel_values = pixel_values.new_zeros(1, 3, side, side)
        with torch.set_grad_enabled(train_vision):
            return ImageFeatures(*self._chosen_patches(pixel_values), num_images)

    def adapt(self, features: ImageFeatures | None) -> Tensor | None:
        """Visual tokens as wide as the language model's, [valid visual tokens, H], of its dtype."""
        if features is None:
            return None
        if self.adapter is None:
            # The decoder layers have a projector each and want the features as they are.
            tokens = features_as_tokens(features.patches, self.config.hidden_size)
        else:
            grid = self.model_config.vision.grid
            tokens = self.adapter(features.patches, grid, features.kept)
        return tokens[: features.num_images * self.model_config.tokens_per_image]

    def decode(
        self, visual: Tensor | None, batch: PackedBatch, attention: AttentionInputs
    ) -> Tensor:
        """This pipeline stage's decoder layers over the tokens of both kinds.

        Args:
            visual: from `adapt`, [valid visual tokens, H], of the model's dtype; read on the first
                pipeline stage only.
            batch: its layout and token ids are read.
            attention: of that layout.

        Returns:
            Hidden states, [S, 1, H] of the model's dtype, as of `DAttnLanguageModel.forward`.
        """
        tokens = self.join_tokens(visual, batch, attention) if self.pre_process else None
        return self.language_model(tokens, attention)

    def join_tokens(
        self, visual: Tensor | None, batch: PackedBatch, attention: AttentionInputs
    ) -> Tensor:
        """This rank's share of the tokens [visual, padded to the budget | text], in the order in
        which they pass the layers, [tokens, 1, H], of the model's dtype."""
        text = self.language_model.embed(batch.input_ids)
        expected = batch.layout.num_visual_tokens
        assert visual is None or visual.shape[0] == expected, (
            f"{visual.shape[0]} visual tokens came out of the adapter, the layout has {expected}"
        )
        # Equal shapes on every rank and in every step: what pipeline stages exchange, and what
        # sequence parallelism cuts into equal shares.
        padding = text.new_zeros(batch.layout.visual_budget - expected, *text.shape[1:])
        parts = (padding, text) if visual is None else (visual.unsqueeze(1), padding, text)
        tokens = self.language_model.scale_tokens(torch.cat(parts))
        if attention.order_tokens is not None:
            tokens = tokens.index_select(0, attention.order_tokens)
        tokens = attention.shards.scatter(tokens)
        if self.adapter is None and torch.is_grad_enabled() and not tokens.requires_grad:
            # megatron-core recomputes a layer in an autograd.Function of its inputs, which does not
            # see the parameters: without an input that wants a gradient it has no backward pass,
            # and the layer is not trained. Here all of the input may come from frozen modules.
            tokens.requires_grad_()
        return tokens

    def loss(self, hidden_states: Tensor, batch: PackedBatch, attention: AttentionInputs) -> Tensor:
        """Cross entropy of every labelled text token, fp32 [labelled].

        Args:
            hidden_states: of the last pipeline stage, [S, 1, H], of the model's dtype.
            batch: its layout and labels are read.
            attention: what they were made with.
        """
        labelled = batch.labelled_tokens()
        # A text token's label is predicted by the token before it, which may be visual.
        predicting = output_tokens(batch.layout, self.attention)
        if attention.order is not None:
            predicting = attention.order.places[predicting]
        tokens, shards = to_device(predicting, labelled.device), attention.shards
        if self.labelled_logits:
            losses = self.language_model.losses(
                hidden_states, tokens[labelled], batch.labels[labelled], shards
            )
        else:
            any_token = batch.labels.clamp(min=0)  # cross entropy has to look up some logit
            losses = self.language_model.losses(hidden_states, tokens, any_token, shards)[labelled]
        return losses if self.exchange is None else share_gradient(losses, self.exchange.ranks)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the previous pipeline stage's hidden states, [S, 1, H], of the model's dtype; the
        schedules call it."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied embedding's weight, in the model's dtype [padded_vocab_size / tensor-parallel
        size, H].

        megatron-core adds up its gradients on the first and the last pipeline stage, which have a
        copy each.
        """
        return self.language_model.shared_embedding_or_output_weight()

    @torch.no_grad()
    def start_at_text_scale(self) -> float | None:
        """Let a new adapter's visual tokens begin as large as text tokens.

        Collective over the tensor-parallel ranks, whose embeddings hold other tokens each.

        Returns:
            The standard deviation of the token embeddings; None where nothing was set: no norm
            stands behind the adapter's MLP, or the configuration says what it starts at.
        """
        adapter = self.adapter
        if adapter is None or adapter.last_norm is None:
            return None
        if self.model_config.adapter.text_scale is not None:
            return None
        scale = self.language_model.embedding_deviation()
        adapter.start_at(scale)
        return scale

    @torch.no_grad()
    def kept_patches(self, pixel_values: Tensor) -> Tensor | None:
        """Patches of each image that enter the decoder, int64 [images, kept]; None if all do.

        Args:
            pixel_values: as for `encode`, [images, 3, image_size, image_size], any floating dtype;
                at least one image.
        """
        return self._chosen_patches(pixel_values)[1]

    def _chosen_patches(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of the patches that enter the decoder, and which they are if not all."""
        assert self.vision_model is not None, "images belong to the first pipeline stage"
        if self.attention.visual.keep == 1.0:
            return self.vision_model(pixel_values), None
        features, received = self.vision_model(pixel_values, with_attention=True)
        kept = most_attended(received, self.model_config.tokens_per_image)
        return take_patches(features, kept), kept

    def attention_inputs(
        self,
        layout: TokenLayout,
        device: torch.device,
        observer: AttentionObserver | None = None,
        order: ReadingOrder | None = None,
        *,
        whole: TokenLayout | None = None,
    ) -> AttentionInputs:
        """Prepare what the layers need to know about a pack, on that device.

        Tokens pass the layers in packed order, or in reading order where that is given. Under
        context parallelism the layout is that of this rank's share of the `whole`.
        Raises ConfigError if no backend fits.
        """
        share, elsewhere = None, None
        if self.exchange is not None:
            assert whole is not None, "a context-parallel rank takes its share of a pack"
            share = share_of(whole, self.exchange.rank, self.exchange.ranks)
            elsewhere = ImagesOfAllRanks(self.exchange) if whole.images else None
        language = self.model_config.language
        # The activations' dtype, also under FP8, which stays inside the linear layers. Not the
        # configuration's: a model may have been cast (verification of imports runs in fp64).
        dtype = next(self.language_model.parameters()).dtype
        return prepare_attention(
            layout,
            self.attention,
            self.rules,
            self._shards(layout if order is None else order.layout),
            select_backend(
                self.attention_backend,
                device,
                dtype,
                language.head_dim,
                softcap=language.attn_logit_softcapping,
            ),
            language=language,
            device=device,
            observer=observer,
            order=order,
            share=share,
            elsewhere=elsewhere,
        )

    def _shards(self, layout: TokenLayout) -> SequenceLayout:
        return SequenceLayout(
            layout.visual_budget,
            layout.text_budget,
            self.pg_collection.tp,
            self.config.sequence_parallel,
        )


def _is_trained(module: torch.nn.Module) -> bool:
    """Whether gradients are wanted for any of its parameters."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
