"""A vision-language model with Decomposed Attention, for transformers.

Images become visual tokens, which are computed once, layer by layer, and read by every text token
after that (`decoder_dattn.py`). `input_ids` hold one `<image>` for each image; it marks the image's
place and is no token of the language model.

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    model.generate(**inputs)                                      # inputs of the processor
    images = model.encode_images(inputs.pop("pixel_values"))      # once ...
    model.generate(**inputs, image_cache=images)                  # ... for any number of prompts

This file travels with the exported weights.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .attention_dattn import Rotary, Seen, rotary_tables, rotate
from .caches_dattn import (
    CACHE_FIELD,
    DAttnCache,
    ImageCache,
    ImagePlaces,
    VisualKVCache,
    given_cache,
)
from .checkpointing_dattn import checkpointed, is_checkpointing
from .columns_dattn import TextProcessors, answering_columns, check_has_text, token_mask
from .configuration_dattn import DAttnConfig
from .decoder_dattn import LanguageModel
from .loss_dattn import next_token_loss
from .vision_dattn import Adapter, VisionTower

logger = logging.get_logger(__name__)


class DAttnPreTrainedModel(PreTrainedModel):
    config_class = DAttnConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012
    _no_split_modules = ["DecoderLayer", "SiglipEncoderLayer", "CLIPEncoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache", "image_cache"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True


class DAttnModel(DAttnPreTrainedModel):
    """Vision encoder, adapter and decoder; no head."""

    _keys_to_ignore_on_load_unexpected = [r"lm_head\.weight"]  # noqa: RUF012

    def __init__(self, config: DAttnConfig) -> None:
        super().__init__(config)
        self.vision_tower = VisionTower(config)
        reprojects = config.visual_source == "reproject"  # then every layer has a projector
        self.multi_modal_projector = nn.Identity() if reprojects else Adapter(config)
        self.language_model = LanguageModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def encode_images(self, pixel_values: Tensor) -> ImageCache:
        """Keys and values of images [n, 3, side, side], any floating dtype, in every layer; no text
        is needed."""
        tokens = self.multi_modal_projector(self.vision_tower(pixel_values))
        tokens = self.language_model.scaled(tokens)
        keys, values = [], []
        for layer in self.language_model.layers:
            key, value, tokens = checkpointed(layer, layer.images, tokens)
            keys.append(key)
            values.append(value)
        entries = torch.arange(len(pixel_values), device=tokens.device)
        return ImageCache(tuple(keys), tuple(values), entries)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        image_cache: ImageCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Any = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states of all columns; those of images and padding mean nothing.

        Args:
            input_ids: int64 [batch, columns], padded left or right; those that follow what the
                cache remembers.
            pixel_values: [images, 3, side, side], any floating dtype, in the reading order of the
                batch's `<image>`s.
            attention_mask: 1 for tokens, 0 for padding, int64 or bool [batch, columns], with or
                without the remembered ones; no padding where None.
            past_key_values, cache: of an earlier call. One thing: transformers has the second name
                for it from 5.24 on.
            image_cache: in place of `pixel_values`.
            use_cache: whether the outputs have a cache; they have none where None.
            output_hidden_states: also what enters each layer, and what leaves the last norm.
            output_attentions, inputs_embeds: refused: weights are not kept, and without ids the
                images' places are not known.

        Raises:
            ValueError: images and `<image>`s differ in number, an image comes after text that is
                already remembered and would have seen it, or an argument cannot be honoured.
        """
        self._refuse(output_attentions, input_ids, inputs_embeds)
        known = given_cache(past_key_values, cache)
        use_cache = self._may_cache(use_cache, known)
        is_token = token_mask(input_ids, attention_mask)
        is_image = (input_ids == self.config.image_token_id) & is_token
        memory = DAttnCache() if known is None else known
        if memory.visual is None:
            if image_cache is None and pixel_values is not None:
                image_cache = self.encode_images(pixel_values)
            positions = self._positions(is_token, is_image, 0)
            memory.visual = self._place_images(is_image, positions, image_cache)
        else:
            if is_image.any() or pixel_values is not None or image_cache is not None:
                raise ValueError(
                    "an image cannot be added to a cached prompt, whose text would have seen it; "
                    "start anew with all images"
                )
            positions = self._positions(is_token, is_image, self._length(memory))
        states = self._run(
            input_ids, positions, is_token & ~is_image, memory, keeps=use_cache or known is not None
        )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            hidden_states=tuple(states) if output_hidden_states else None,
            **_cache_field(memory if use_cache else None),
        )

    def _refuse(
        self, output_attentions: bool | None, input_ids: Any, inputs_embeds: Tensor | None
    ) -> None:
        """Arguments that callers of transformers' models may give, and this one cannot honour."""
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions:
            raise ValueError(
                "output_attentions: this model keeps no attention weights; leave it out"
            )
        if inputs_embeds is not None or input_ids is None:
            raise ValueError("inputs_embeds: pass input_ids, which say where the images stand")

    def _may_cache(self, use_cache: bool | None, known: DAttnCache | None) -> bool:
        """Whether to return a cache: not under gradient checkpointing, where every layer runs twice
        and would remember its text twice."""
        if not any(map(is_checkpointing, self.language_model.layers)):
            return bool(use_cache)
        if known is not None:
            raise ValueError("gradient checkpointing cannot go on from a cache; pass all input_ids")
        if use_cache:
            logger.warning_once("use_cache=True is ignored under gradient checkpointing")
        return False

    def _run(
        self,
        input_ids: Tensor,
        positions: Tensor,
        is_text: Tensor,
        memory: DAttnCache,
        *,
        keeps: bool,
    ) -> list[Tensor]:
        """What enters each layer, and what leaves the last norm."""
        language, visual = self.language_model, memory.visual
        assert visual is not None
        seen = self._seen(memory.extend_text(is_text), input_ids.shape[1], visual)
        rotary = self._rotary(positions)
        # `<image>` is no token of the language model and may lie behind its vocabulary.
        is_image = input_ids == self.config.image_token_id
        tokens = language.scaled(language.embed_tokens(input_ids.masked_fill(is_image, 0)))
        states = []
        for layer, key, value in zip(language.layers, visual.keys, visual.values, strict=True):
            states.append(tokens)
            run = partial(_run_layer, layer, rotary, seen, memory if keeps else None)
            tokens = checkpointed(layer, run, tokens, key, value)
        return [*states, language.norm(tokens)]

    def _positions(self, is_token: Tensor, is_image: Tensor, start: Tensor | int) -> Tensor:
        """Rotary position of every column: a text token's own, an image's first token's.

        Columns of padding have a meaningless one.
        """
        per_image = self.config.tokens_per_image if self.config.text_positions == "gap" else 0
        widths = torch.where(is_image, per_image, is_token.long())
        return widths.cumsum(1) - widths + start

    def _length(self, cache: DAttnCache) -> Tensor:
        """The position that follows everything remembered, [batch, 1]."""
        assert cache.visual is not None
        assert cache.is_text is not None
        length = cache.is_text.sum(1, keepdim=True)
        if self.config.text_positions == "gap":
            length = length + cache.visual.is_filled.sum(1, keepdim=True)
        return length

    def _place_images(
        self, is_image: Tensor, positions: Tensor, images: ImageCache | None
    ) -> VisualKVCache:
        """Visual tokens of the samples whose `<image>`s they fill."""
        expected, given = int(is_image.sum()), 0 if images is None else len(images)
        if expected != given:
            raise ValueError(
                f"the batch has {expected} <image> tokens, but {given} images were given"
            )
        places = ImagePlaces.find(is_image, positions)
        if images is None:
            return self._no_tokens(is_image)
        visual = VisualKVCache.gather(images, places)
        if self.config.t2v_rotary:
            rotary = self._rotary(places.token_positions(self.config.tokens_per_image))
            visual.keys = [rotate(key, rotary) for key in visual.keys]
        return visual

    def _no_tokens(self, is_image: Tensor) -> VisualKVCache:
        text = self.config.text_config
        shape = (len(is_image), text.num_key_value_heads, 0, self.config.head_dim)
        none = self.language_model.norm.weight.new_zeros(shape)
        layers = text.num_hidden_layers
        column = torch.zeros(len(is_image), 0, dtype=torch.int64, device=is_image.device)
        return VisualKVCache([none] * layers, [none] * layers, column, column.bool())

    def _seen(self, is_text: Tensor, num_new: int, visual: VisualKVCache) -> Seen:
        """Which keys the newest columns see, of all text columns and of the visual tokens."""
        column = torch.arange(is_text.shape[1], device=is_text.device)
        new = column[-num_new:].unsqueeze(1)
        text = is_text.unsqueeze(1) & (column <= new)
        images = visual.is_filled.unsqueeze(1).expand(-1, num_new, -1)
        if self.config.t2v_scope == "following":
            images = images & (visual.column.unsqueeze(1) < new)
        return Seen(images, text, self._near(is_text, num_new, text))

    def _near(self, is_text: Tensor, num_new: int, text: Tensor) -> Tensor:
        """The seen text inside the sliding window. Places count text tokens: no padding, no
        image."""
        window = self.config.sliding_window
        if window is None:
            return text
        place = is_text.cumsum(1)
        return text & (place[:, -num_new:].unsqueeze(2) - place.unsqueeze(1) < window)

    def _rotary(self, positions: Tensor) -> Rotary:
        rope = self.config.text_config.rope_parameters
        return rotary_tables(positions, self.config.head_dim, rope)


def _cache_field(cache: DAttnCache | None) -> dict[str, Any]:
    """The argument of an output's class."""
    return {CACHE_FIELD: cache}


def _run_layer(
    layer: nn.Module,
    rotary: Rotary,
    seen: Seen,
    cache: DAttnCache | None,
    tokens: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    new_tokens: Tensor = layer(tokens, rotary, (key, value), seen, cache)
    return new_tokens


class DAttnForConditionalGeneration(DAttnPreTrainedModel, GenerationMixin):
    """The model with its language head."""

    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.weight": "model.language_model.embed_tokens.weight"
    }
    # So says transformers' Trainer `num_items_in_batch`, and leaves the division to `forward`.
    accepts_loss_kwargs = True

    def __init__(self, config: DAttnConfig) -> None:
        super().__init__(config)
        text = config.text_config
        self.model = DAttnModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> ImageCache:
        """Keys and values of images [n, 3, side, side], any floating dtype, in every layer, for
        `generate(..., image_cache=...)`.

        The cache's i-th entry belongs to the batch's i-th `<image>`; `ImageCache.select` repeats
        entries where several prompts ask about one image. Not for training: no gradient flows.
        """
        return self.model.encode_images(pixel_values)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        image_cache: ImageCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Any = None,
    ) -> CausalLMOutputWithPast:
        """Logits of all columns, or of some; arguments as of `DAttnModel`.

        An `<image>`'s column has the logits of the last text before it: of what follows.

        Args:
            labels: int64 [batch, columns], -100 where nothing is supervised, which is as good as
                always so at `<image>`: also return the loss of every text token's next text token.
            logits_to_keep: how many of the last columns, or which ones; 0 for all.
            num_items_in_batch: what the summed loss is divided by, as transformers' Trainer says
                when it accumulates gradients; the mean over `labels` where None. Without `labels`
                the caller makes the loss, and divides.

        Raises:
            ValueError: as of `DAttnModel`; a sample of images without text; `labels` beside
                `logits_to_keep`.
        """
        if labels is not None and (isinstance(logits_to_keep, Tensor) or logits_to_keep):
            raise ValueError("logits_to_keep leaves out what the loss of labels needs; pass one")
        outputs = self.model(
            input_ids,
            pixel_values,
            attention_mask,
            past_key_values,
            image_cache,
            use_cache,
            output_hidden_states,
            output_attentions,
            inputs_embeds,
            cache,
            return_dict=True,
        )
        is_token = token_mask(input_ids, attention_mask)
        is_image = (input_ids == self.config.image_token_id) & is_token
        is_text = is_token & ~is_image
        check_has_text(is_text, is_image)
        logits = self._logits(outputs.last_hidden_state, answering_columns(is_text), logits_to_keep)
        loss = None
        if labels is not None:
            loss = next_token_loss(logits, labels, is_text, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **_cache_field(outputs.get(CACHE_FIELD)),
        )

    def _logits(self, tokens: Tensor, answering: Tensor, kept: int | Tensor) -> Tensor:
        answering = answering[:, slice(-kept, None) if isinstance(kept, int) else kept]
        tokens = tokens.gather(1, answering.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        logits = self.lm_head(tokens)
        softcap = getattr(self.config.text_config, "final_logit_softcapping", None)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Any, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        given_cache(kwargs.get("past_key_values"), kwargs.get("cache"))
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("image_cache", None)
            inputs.pop("pixel_values", None)
        return inputs

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        processors = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        if self.config.image_token_id >= self.config.text_config.vocab_size:
            processors = TextProcessors(processors)
            processors.image_token_id = self.config.image_token_id
        return processors

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Any = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat every sample, with its images: these are encoded once and shared."""
        if expand_size > 1 and input_ids is not None:
            pixel_values = model_kwargs.pop("pixel_values", None)
            if pixel_values is not None:
                model_kwargs["image_cache"] = self.encode_images(pixel_values)
            if model_kwargs.get("image_cache") is not None:
                counts = (input_ids == self.config.image_token_id).sum(1).tolist()
                numbers = torch.arange(sum(counts)).split(counts)
                repeated = torch.cat([n.repeat(expand_size) for n in numbers])
                model_kwargs["image_cache"] = model_kwargs["image_cache"].select(repeated)
        return super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
