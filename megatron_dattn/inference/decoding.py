"""Prompts that grow by a token at a time: every new token costs the pass of one text token.

The layers are those of training, with a cache of keys and values each, so nothing is computed
twice: a key is rotated once, when it is remembered. The prompts themselves are read in one of two
ways, which give the same numbers:

- where visual tokens attend to nothing but themselves, every distinct image is encoded once
  (`image_cache.py`), and only text tokens pass the layers;
- otherwise what an image becomes depends on the text before it, so the whole pack passes the model
  once.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_dattn.attention.backends.dense import DenseBackend
from megatron_dattn.attention.backends.math import MathBackend
from megatron_dattn.attention.layers import output_tokens
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.plan.decode import GrowingText, SampleTable, next_positions
from megatron_dattn.attention.positions import apply_rotary
from megatron_dattn.inference.image_cache import can_keep_images, encode_once
from megatron_dattn.inference.load import LoadedModel, model_device
from megatron_dattn.inference.prompt import Prompt, pack_prompts, prompt_layout
from megatron_dattn.models.attention_inputs import AttentionInputs, LayerInputs
from megatron_dattn.models.kv_cache import DecodeCache, DecodeStep, KVCache
from megatron_dattn.parallel.sequence import SequenceLayout


class Decoding:
    """Several prompts in one pack, and the tokens that follow them.

    `start` comes first, once. Run both methods under `torch.inference_mode`.

    Args:
        prompts: at least one.
    """

    def __init__(self, loaded: LoadedModel, prompts: Sequence[Prompt]) -> None:
        self._loaded, self._model = loaded, loaded.model
        self._prompts = prompts
        self._device = model_device(loaded.model)
        self._layout = prompt_layout(loaded, [(prompt, []) for prompt in prompts])
        self._caches = [KVCache() for _ in self._model.rules]
        self._prompt_inputs = self._model.attention_inputs(self._layout, self._device)
        self._positions = torch.tensor(next_positions(self._layout, self._model.attention))
        self._samples = list(range(len(prompts)))  # that still go on
        self._steps: list[_EqualLayers] | None = None

    def prefill(self) -> Tensor:
        """Logits of every prompt's next token, [prompts, vocab_size], of the model's dtype.

        Raises:
            ConfigError: an image was encoded by another model.
        """
        if can_keep_images(self._loaded):
            return self._read_text()
        return self._read_whole_pack()

    def decode_step(self, samples: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Logits of the tokens that follow these, [samples, vocab_size], of the model's dtype.

        Args:
            samples: numbers of the prompts that go on, in ascending order; the others have ended.
            tokens: what was said last in each of them.
        """
        if self._steps is None:
            self._steps = self._lay_out_samples()
        if len(samples) < len(self._samples):
            kept = [self._samples.index(sample) for sample in samples]
            self._samples, self._positions = list(samples), self._positions[kept]
            for layers in self._steps:
                layers.keep(kept)
        language = self._model.model_config.language
        cos, sin = language.rotary_tables(self._positions, self._device)
        self._positions = self._positions + 1
        inputs: dict[int, LayerInputs] = {}
        for layers in self._steps:
            inputs |= layers.next_inputs((cos.unsqueeze(1), sin.unsqueeze(1)))
        by_layer = [inputs[number] for number in range(len(inputs))]
        return self._pass(tokens, by_layer, torch.arange(len(samples)))

    def _read_text(self) -> Tensor:
        """The prompts' text tokens, reading what images left."""
        images = encode_once(self._loaded, (i for prompt in self._prompts for i in prompt.images))
        for number, rule in enumerate(self._model.rules):
            if rule.sees_images:
                self._caches[number] = KVCache(image.layers[number] for image in images)
        tokens = [token for prompt in self._prompts for token in prompt.tokens.input_ids]
        layers = [
            # No visual token passes, so none outputs its own value.
            replace(layer, plan=replace(layer.plan, num_diagonal_tokens=0), cache=cache)
            for layer, cache in zip(self._prompt_inputs.by_layer, self._caches, strict=True)
        ]
        return self._pass(tokens, layers, self._last_text_tokens())

    def _read_whole_pack(self) -> Tensor:
        """The forward pass of training."""
        model, layout = self._model, self._layout
        batch = pack_prompts(self._loaded, [(prompt, []) for prompt in self._prompts])
        tokens = output_tokens(layout, model.attention)[self._last_text_tokens()]
        attention = self._prompt_inputs.with_caches(self._caches)
        hidden_states = model.decode(
            model.adapt(model.encode(batch.pixel_values)), batch, attention
        )
        return model.language_model.gathered_logits(
            hidden_states, tokens.to(self._device), attention.shards
        )

    def _pass(self, ids: Sequence[int], layers: Sequence[LayerInputs], chosen: Tensor) -> Tensor:
        """Logits at some of the new text tokens, [chosen, vocab_size].

        Args:
            ids: of all new tokens.
            layers: what each layer needs to know about them.
            chosen: numbers of new tokens, int64 [chosen].
        """
        language = self._model.language_model
        shards = SequenceLayout(0, len(ids), self._model.pg_collection.tp, sequence_parallel=False)
        by_layer = tuple(replace(layer, shards=shards) for layer in layers)
        attention = AttentionInputs(by_layer, shards)
        tokens = language.scale_tokens(language.embed(torch.tensor(ids, device=self._device)))
        hidden_states = language(tokens, attention)
        return language.gathered_logits(hidden_states, chosen.to(self._device), shards)

    def _lay_out_samples(self) -> list["_EqualLayers"]:
        """What was remembered of the prompts, sample by sample."""
        language, model = self._model.model_config.language, self._model.language_model
        # By identity: `prepare_attention` gave layers with equal rules and windows the same object.
        made: dict[int, _EqualLayers] = {}
        for number, inputs in enumerate(self._prompt_inputs.by_layer):
            if id(inputs) not in made:
                layout = inputs.rule.layout(self._layout)
                made[id(inputs)] = _EqualLayers(inputs, layout, language.window(number))
            attention = model.decoder.layers[number].self_attention
            key, value = self._caches[number].tokens
            made[id(inputs)].add(number, key, value, attention.head_mask(value))
            self._caches[number] = KVCache()  # one layer at a time is in memory twice
        return list(made.values())

    def _last_text_tokens(self) -> Tensor:
        """The last text token of every prompt, counted from the first text token."""
        return torch.tensor([end - 1 for end in self._layout.text_cu_seqlens[1:]])


class _EqualLayers:
    """Layers with equal rules and windows, which share a plan in every step.

    Args:
        inputs: of the prompts' pass.
        layout: the prompts as these layers see them.
    """

    def __init__(self, inputs: LayerInputs, layout: TokenLayout, window: int | None) -> None:
        self._inputs = inputs
        # Kernels for packs know no tables with padding.
        backend = inputs.backend
        self._backend = backend if isinstance(backend, DenseBackend) else MathBackend()
        self._num_visual = layout.visual_budget
        self._visual, self._text = SampleTable.visual(layout), SampleTable.text(layout)
        self._growth = GrowingText(layout, inputs.rule.attention, window=window)
        self._caches: dict[int, DecodeCache] = {}

    def add(self, number: int, key: Tensor, value: Tensor, head_mask: Tensor | None) -> None:
        """Lay out a layer's keys and values, [visual | text], [tokens, key heads, head_dim]."""
        visual = slice(self._num_visual)
        rotated = apply_rotary(key, self._inputs.rotary)
        images = None
        if self._visual.num_columns:
            keys = rotated if self._inputs.rule.attention.t2v.rotary else key
            values = value[visual]
            if head_mask is not None:
                values = values * head_mask.to(value.dtype).unsqueeze(-1)
            images = self._visual.take(keys[visual]), self._visual.take(values)
        self._caches[number] = DecodeCache(
            images, (self._text.take(rotated), self._text.take(value))
        )
        self._dtype = self._backend.decoding_dtype(key.dtype)

    def keep(self, samples: list[int]) -> None:
        """Go on with these samples alone."""
        self._growth.keep(samples)
        for cache in self._caches.values():
            cache.keep(samples)

    def next_inputs(self, rotary: tuple[Tensor, Tensor]) -> dict[int, LayerInputs]:
        """Of the layers by number, for one more token of each sample.

        Args:
            rotary: cosine and sine of those tokens, [samples, 1, head_dim] each.
        """
        self._growth.add_token()
        plan = self._growth.plan(rotary[0].device, self._dtype)
        return {
            number: replace(self._inputs, step=DecodeStep(cache, plan, rotary, self._backend))
            for number, cache in self._caches.items()
        }
