"""Keys and values that a decoder layer's attention keeps from one pass to the next.

Training has none. In generation a pass brings new text tokens alone; what they attend to came
before: images, which may have been encoded for another prompt, and earlier text.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]
"""Of the same tokens, [tokens, key heads, head_dim] each, without rotation."""


class KVCache:
    """Keys and values of one layer's tokens, [visual | text so far].

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
            key: of the new tokens, [N, key heads, head_dim]; maybe of none.
            value: shaped alike.
        """
        # Copies the cache in every pass, as Hugging Face's DynamicCache does. Memory that is set
        # aside for the longest answer would need as much from the start.
        keys, values = zip(*self._pieces, (key, value), strict=True)
        tokens = (key, value) if len(keys) == 1 else (torch.cat(keys), torch.cat(values))
        self._pieces = [tokens]
        return tokens

    @property
    def tokens(self) -> KeyValue:
        """Of all tokens so far, after the first pass."""
        (tokens,) = self._pieces
        return tokens
