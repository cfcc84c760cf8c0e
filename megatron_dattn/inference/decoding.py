"""Prompts that grow by a token at a time: every new token costs the pass of one text token.

The layers are those of training, with a cache of keys and values each, so nothing is computed
twice. The prompts themselves are read in one of two ways, which give the same numbers:

- where visual tokens attend to nothing but themselves, every distinct image is encoded once
  (`image_cache.py`), and only text tokens pass the layers;
- otherwise what an image becomes depends on the text before it, so the whole pack passes the model
  once.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_dattn.attention.layers import output_tokens
from megatron_dattn.attention.plan.decode import next_positions, plan_decode_step
from megatron_dattn.inference.image_cache import can_keep_images, encode_once
from megatron_dattn.inference.load import LoadedModel, model_device
from megatron_dattn.inference.prompt import Prompt, pack_prompts, prompt_layout
from megatron_dattn.models.attention_inputs import AttentionInputs, LayerInputs
from megatron_dattn.models.kv_cache import KVCache
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
        # The first layer sees images, so these are of all tokens.
        self._rotary = self._prompt_inputs.layer(1).rotary
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
        return self._pass(tokens, self._next_inputs(len(samples)), torch.arange(len(samples)))

    def _read_text(self) -> Tensor:
        """The prompts' text tokens, reading what images left."""
        images = encode_once(self._loaded, (i for prompt in self._prompts for i in prompt.images))
        for number, rule in enumerate(self._model.rules):
            if rule.sees_images:
                self._caches[number] = KVCache(image.layers[number] for image in images)
        tokens = [token for prompt in self._prompts for token in prompt.tokens.input_ids]
        layers = [
            # No visual token passes, so none outputs its own value.
            replace(layer, plan=replace(layer.plan, num_diagonal_tokens=0))
            for layer in self._prompt_inputs.by_layer
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
        attention = AttentionInputs(by_layer, shards).with_caches(self._caches)
        tokens = language.scale_tokens(language.embed(torch.tensor(ids, device=self._device)))
        hidden_states = language(tokens, attention)
        return language.gathered_logits(hidden_states, chosen.to(self._device), shards)

    def _next_inputs(self, num_new: int) -> list[LayerInputs]:
        """What the layers need to know about the newest tokens; equal layers share it."""
        # By identity: `prepare_attention` gave layers with equal rules and windows the same object.
        made: dict[int, LayerInputs] = {}
        layers = self._prompt_inputs.by_layer
        for number, before in enumerate(layers):
            if id(before) not in made:
                made[id(before)] = self._grow(number, before, num_new)
        return [made[id(before)] for before in layers]

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
