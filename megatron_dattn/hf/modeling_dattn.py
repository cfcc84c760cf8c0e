"""A vision-language model with Decomposed Attention, for transformers.

Images become visual rows, which are computed once, layer by layer, and read by every text row
after that (`decoder_dattn.py`). `input_ids` hold one `<image>` for each image; it marks the image's
place and is no row of the language model, so its column's logits mean nothing.

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    model.generate(**inputs)                                      # inputs of the processor
    images = model.encode_images(inputs.pop("pixel_values"))      # once ...
    model.generate(**inputs, image_cache=images)                  # ... for any number of prompts

This file travels with the exported weights.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .attention_dattn import Rotary, Seen, rotary_tables, rotate
from .caches_dattn import DAttnCache, ImageCache, ImagePlaces, VisualRows
from .configuration_dattn import DAttnConfig
from .decoder_dattn import LanguageModel
from .vision_dattn import Adapter, VisionTower

IGNORED_LABEL = -100


class DAttnPreTrainedModel(PreTrainedModel):
    config_class = DAttnConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012
    _no_split_modules = ["DecoderLayer", "SiglipEncoderLayer", "CLIPEncoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "image_cache"]  # noqa: RUF012
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
        """Keys and values of images in every layer, [images, 3, side, side]; no text is needed."""
        rows = self.multi_modal_projector(self.vision_tower(pixel_values))
        rows = self.language_model.scaled(rows)
        keys, values = [], []
        for layer in self.language_model.layers:
            key, value, rows = layer.images(rows)
            keys.append(key)
            values.append(value)
        entries = torch.arange(len(pixel_values), device=rows.device)
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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of all columns.

        Args:
            input_ids: int64 [batch, columns], padded left or right; those that follow what
                `past_key_values` remembers.
            pixel_values: [images, 3, side, side], in the reading order of the batch's `<image>`s.
            attention_mask: 1 for tokens, 0 for padding, [batch, columns], with or without the
                remembered ones; no padding where None.
            past_key_values: of an earlier call.
            image_cache: in place of `pixel_values`.

        Raises:
            ValueError: images and `<image>`s differ in number, or an image comes after text that
                is already remembered and would have seen it.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        is_token = attention_mask[:, -input_ids.shape[1] :].bool()
        is_image = (input_ids == self.config.image_token_id) & is_token
        cache = _own_cache(past_key_values)
        if cache.visual is None:
            if image_cache is None and pixel_values is not None:
                image_cache = self.encode_images(pixel_values)
            positions = self._positions(is_token, is_image, 0)
            cache.visual = self._place_images(is_image, positions, image_cache)
        else:
            if is_image.any():
                raise ValueError(
                    "an image cannot be added to a cached prompt, whose text would have seen it; "
                    "start anew with all images"
                )
            positions = self._positions(is_token, is_image, self._length(cache))
        rows = self._run(input_ids, positions, is_token & ~is_image, cache)
        return BaseModelOutputWithPast(
            last_hidden_state=rows, past_key_values=cache if use_cache else None
        )

    def _run(
        self, input_ids: Tensor, positions: Tensor, is_text: Tensor, cache: DAttnCache
    ) -> Tensor:
        language, visual = self.language_model, cache.visual
        assert visual is not None
        seen = self._seen(cache.extend_text(is_text), input_ids.shape[1], visual)
        rotary = self._rotary(positions)
        rows = language.scaled(language.embed_tokens(input_ids))
        for layer, key, value in zip(language.layers, visual.keys, visual.values, strict=True):
            rows = layer(rows, rotary, (key, value), seen, cache)
        return language.norm(rows)

    def _positions(self, is_token: Tensor, is_image: Tensor, start: Tensor | int) -> Tensor:
        """Rotary position of every column: a text row's own, an image's first row's.

        Columns of padding have a meaningless one.
        """
        per_image = self.config.rows_per_image if self.config.text_positions == "gap" else 0
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
    ) -> VisualRows:
        """Visual rows of the samples whose `<image>`s they fill."""
        expected, given = int(is_image.sum()), 0 if images is None else len(images)
        if expected != given:
            raise ValueError(
                f"the batch has {expected} <image> tokens, but {given} images were given"
            )
        places = ImagePlaces.find(is_image, positions)
        if images is None:
            return self._no_rows(is_image)
        visual = VisualRows.gather(images, places)
        if self.config.t2v_rotary:
            rotary = self._rotary(places.row_positions(self.config.rows_per_image))
            visual.keys = [rotate(key, rotary) for key in visual.keys]
        return visual

    def _no_rows(self, is_image: Tensor) -> VisualRows:
        text = self.config.text_config
        shape = (len(is_image), text.num_key_value_heads, 0, self.config.head_dim)
        none = self.language_model.norm.weight.new_zeros(shape)
        layers = text.num_hidden_layers
        column = torch.zeros(len(is_image), 0, dtype=torch.int64, device=is_image.device)
        return VisualRows([none] * layers, [none] * layers, column, column.bool())

    def _seen(self, is_text: Tensor, num_new: int, visual: VisualRows) -> Seen:
        """Which keys the newest columns see, of all text columns and of the visual rows."""
        column = torch.arange(is_text.shape[1], device=is_text.device)
        new = column[-num_new:].unsqueeze(1)
        text = is_text.unsqueeze(1) & (column <= new)
        images = visual.is_filled.unsqueeze(1).expand(-1, num_new, -1)
        if self.config.t2v_scope == "following":
            images = images & (visual.column.unsqueeze(1) < new)
        return Seen(images, text, self._near(is_text, num_new, text))

    def _near(self, is_text: Tensor, num_new: int, text: Tensor) -> Tensor:
        """The seen text inside the sliding window. Places count text rows: no padding, no image."""
        window = self.config.sliding_window
        if window is None:
            return text
        place = is_text.cumsum(1)
        return text & (place[:, -num_new:].unsqueeze(2) - place.unsqueeze(1) < window)

    def _rotary(self, positions: Tensor) -> Rotary:
        rope = self.config.text_config.rope_parameters
        return rotary_tables(positions, self.config.head_dim, rope)


def _own_cache(past_key_values: Any) -> DAttnCache:
    """The given cache, or a new one in place of the empty plain one that `generate` makes."""
    if isinstance(past_key_values, DAttnCache):
        return past_key_values
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        raise ValueError(f"past_key_values must be a DAttnCache, not {type(past_key_values)}")
    return DAttnCache()


class DAttnForConditionalGeneration(DAttnPreTrainedModel, GenerationMixin):
    """The model with its language head."""

    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.weight": "model.language_model.embed_tokens.weight"
    }

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
        """Keys and values of images in every layer, for `generate(..., image_cache=...)`.

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
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of all columns, or of the last `logits_to_keep`; arguments as of `DAttnModel`.

        With `labels` (of `input_ids`' shape, -100 where nothing is supervised) also the mean loss
        of every text row's next text token.
        """
        outputs = self.model(
            input_ids, pixel_values, attention_mask, past_key_values, image_cache, use_cache
        )
        loss = None
        logits = self._logits(outputs.last_hidden_state[:, -logits_to_keep:])
        if labels is not None:
            is_text = input_ids != self.config.image_token_id
            if attention_mask is not None:
                is_text = is_text & attention_mask.bool()
            loss = _next_token_loss(logits, labels, is_text)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values
        )

    def _logits(self, rows: Tensor) -> Tensor:
        logits = self.lm_head(rows)
        softcap = getattr(self.config.text_config, "final_logit_softcapping", None)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Any, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        # Positions are the model's own affair: they depend on where the images stand.
        inputs.pop("position_ids", None)
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("image_cache", None)
            inputs.pop("pixel_values", None)
        return inputs

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


def _next_token_loss(logits: Tensor, labels: Tensor, is_text: Tensor) -> Tensor:
    """Mean cross entropy of the next text token of the same sample, in fp32."""
    sample = is_text.nonzero()[:, 0]
    rows, targets = logits[is_text][:-1].float(), labels[is_text][1:]
    targets = targets.masked_fill(sample[:-1] != sample[1:], IGNORED_LABEL)
    return F.cross_entropy(rows, targets, ignore_index=IGNORED_LABEL)
