"""Keys and values that a decoder layer's attention keeps from one pass to the next.

Training has none. In generation the first pass reads the prompts: a `KVCache` keeps what it
projected, as a pack, and may bring images that were encoded for another prompt. Every later pass
brings one text token per sample: a `DecodeCache` has the same keys and values sample by sample, as
scores want them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dattn.attention.backends.dense import DenseBackend
from megatron_dattn.attention.decode import SampleKeyValue
from megatron_dattn.attention.plan.decode import DecodePlan

KeyValue = tuple[Tensor, Tensor]
"""Of the same tokens, [tokens, key heads, head_dim] each, without rotation."""


class KVCache:
    """Keys and values of a pack's tokens in one layer, [visual | text].

    Visual tokens have those that text tokens read: under merge "cascade" the cross-attention's.
    Keys are kept without rotation, so that an image may stand at any place of any prompt.

    Args:
        tokens: what is known before the first pass.
    """

    def __init__(self, tokens: Iterable[KeyValue] = ()) -> None:
        self._pieces = list(tokens)

    def extend(self, key: Tensor, value: Tensor) -> KeyValue:
        """Remember more tokens' and return those of all tokens.

        Args:
            key: of the new tokens, [N, key heads, head_dim], of the model's dtype; maybe of none.
            value: shaped alike.
        """
        keys, values = zip(*self._pieces, (key, value), strict=True)
        tokens = (key, value) if len(keys) == 1 else (torch.cat(keys), torch.cat(values))
        self._pieces = [tokens]
        return tokens

    @property
    def tokens(self) -> KeyValue:
        """Of all tokens so far, after the first pass."""
        (tokens,) = self._pieces
        return tokens


class DecodeCache:
    """Keys and values by sample, keys rotated where their scores are.

    Args:
        images: of visual tokens; None if there are none. Never written to.
        text: of the prompts' text tokens.
    """

    def __init__(self, images: SampleKeyValue | None, text: SampleKeyValue) -> None:
        self.images = images
        self._length = text[0].shape[1]
        self._text = _longer(text)

    def add(self, key: Tensor, value: Tensor) -> SampleKeyValue:
        """Remember one text token per sample, [samples, key heads, head_dim], of the model's dtype;
        returns all text tokens' key and value."""
        if self._length == self._text[0].shape[1]:
            self._text = _longer(self._text)
        memory_of_keys, memory_of_values = self._text
        memory_of_keys[:, self._length] = key
        memory_of_values[:, self._length] = value
        self._length += 1
        return memory_of_keys[:, : self._length], memory_of_values[:, : self._length]

    def keep(self, samples: list[int]) -> None:
        """Go on with these samples alone; the memory of the others is free."""
        if self.images is not None:
            self.images = (self.images[0][samples], self.images[1][samples])
        self._text = (self._text[0][samples], self._text[1][samples])


@dataclass(frozen=True)
class DecodeStep:
    """What one layer needs to know about the newest tokens, one per sample."""

    cache: DecodeCache
    plan: DecodePlan
    rotary: tuple[Tensor, Tensor]
    """Cosine and sine of the newest tokens, each [samples, 1, head_dim]."""
    backend: DenseBackend


def _longer(text: SampleKeyValue) -> SampleKeyValue:
    """The same tokens with unused columns behind them.

    As many as there are, at least 64: a copy per doubling, not per token. Images, which are most of
    what is remembered, are not in here.
    """
    samples, length, *shape = text[0].shape
    size = length + max(length, 64)
    longer = tuple(tokens.new_empty(samples, size, *shape) for tokens in text)
    for memory, tokens in zip(longer, text, strict=True):
        memory[:, :length] = tokens
    return longer[0], longer[1]
