"""Prompts that grow by a token at a time: every new token costs the pass of one text token.

Keys and values of all tokens stay in a cache, so nothing is computed twice. The prompts themselves
are read in one of two ways, which give the same numbers:

- where visual tokens attend to nothing but themselves, every distinct image is encoded once
  (`image_cache.py`), and only text tokens pass the layers;
- otherwise what an image becomes depends on the text before it, so the whole pack passes the model
  once, as in training, and what its layers attend with is written down on the way.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_dattn.attention import next_positions, output_tokens, plan_decode_step
from megatron_dattn.inference.image_cache import can_keep_images, encode_once
from megatron_dattn.inference.layers import LayerKVCache, pass_text
from megatron_dattn.inference.load import LoadedModel, model_device
from megatron_dattn.inference.prompt import Prompt, pack_prompts, prompt_layout
from megatron_dattn.models.attention_inputs import LayerInputs
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
        self._layers = self._model.language_model.decoder.layers
        self._caches = [LayerKVCache() for _ in self._layers]
        inputs = self._model.attention_inputs(self._layout, self._device)
        self._prompt_inputs = inputs.by_layer
        self._rotary = inputs.layer(
            1
        ).rotary  # the first layer sees images, so these are all tokens
        self._positions = next_positions(self._layout, self._model.attention)
        self._added: list[int] = []  # the sample of every token that came after the prompts

    def prefill(self) -> Tensor:
        """Logits of every prompt's next token, [prompts, vocab_size].

        Raises:
            ConfigError: an image was encoded by another model.
        """
        if can_keep_images(self._loaded):
            return self._read_text()
        return self._read_whole_pack()

    def decode_step(self, samples: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Logits of the tokens that follow these, [samples, vocab_size].

        Args:
            samples: numbers of the prompts that go on; the others wait.
            tokens: what was said last in each of them.
        """
        positions = torch.tensor([self._positions[sample] for sample in samples])
        for sample in samples:
            self._positions[sample] += 1
        self._added += samples
        language = self._model.model_config.language
        new = language.rotary_tables(positions, self._device)
        cos, sin = (torch.cat(tables) for tables in zip(self._rotary, new, strict=True))
        self._rotary = cos, sin
        return self._logits(self._pass(torch.tensor(tokens), self._next_inputs(len(samples))))

    def _read_text(self) -> Tensor:
        """The prompts' text tokens, reading what images left."""
        images = encode_once(self._loaded, (i for prompt in self._prompts for i in prompt.images))
        for number, rule in enumerate(self._model.rules):
            if rule.sees_images:
                self._caches[number] = LayerKVCache(image.layers[number] for image in images)
        tokens = [token for prompt in self._prompts for token in prompt.tokens.input_ids]
        hidden_states = self._pass(torch.tensor(tokens), self._prompt_inputs)
        return self._logits(hidden_states[self._last_text_tokens()])

    def _read_whole_pack(self) -> Tensor:
        """The forward pass of training."""
        batch = pack_prompts(self._loaded, [(prompt, []) for prompt in self._prompts])
        tokens = output_tokens(self._layout, self._model.attention)[self._last_text_tokens()]
        listeners = [
            layer.self_attention.core_attention.register_forward_pre_hook(partial(_keep, cache))
            for layer, cache in zip(self._layers, self._caches, strict=True)
        ]
        try:
            return self._model.forward_logits(batch, tokens.to(self._device))
        finally:
            for listener in listeners:
                listener.remove()

    def _pass(self, tokens: Tensor, inputs: Sequence[LayerInputs]) -> Tensor:
        """New text tokens through all layers, [tokens, 1, H]."""
        language = self._model.language_model
        tokens = language.scale_tokens(language.embed(tokens.to(self._device)))
        for layer, of_layer, cache in zip(self._layers, inputs, self._caches, strict=True):
            tokens = pass_text(layer, tokens, of_layer, cache)
        return tokens

    def _next_inputs(self, num_new: int) -> list[LayerInputs]:
        """What the layers need to know about the newest tokens; equal layers share it."""
        made: dict[int, LayerInputs] = {}
        for number, before in enumerate(self._prompt_inputs):
            if id(before) not in made:
                made[id(before)] = self._grow(number, before, num_new)
        return [made[id(before)] for before in self._prompt_inputs]

    def _grow(self, number: int, before: LayerInputs, num_new: int) -> LayerInputs:
        rule = before.rule
        plan = plan_decode_step(
            rule.layout(self._layout),
            self._added,
            num_new,
            rule.attention,
            self._device,
            window=self._model.model_config.language.window(number),
        )
        cos, sin = (table[-plan.num_tokens :] for table in self._rotary)
        return replace(before, plan=plan, rotary=(cos, sin))

    def _last_text_tokens(self) -> Tensor:
        """The last text token of every prompt, counted from the first text token."""
        return torch.tensor([end - 1 for end in self._layout.text_cu_seqlens[1:]])

    def _logits(self, tokens: Tensor) -> Tensor:
        language = self._model.language_model
        chosen = torch.arange(len(tokens), device=tokens.device)
        shards = SequenceLayout(
            0, len(tokens), self._model.pg_collection.tp, sequence_parallel=False
        )
        return language.gathered_logits(language.decoder.final_layernorm(tokens), chosen, shards)


def _keep(cache: LayerKVCache, _: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
    """A hook before an attention core: the keys and values it is given are remembered."""
    key, value = arguments[1:3]
    cache.append(key, value)
