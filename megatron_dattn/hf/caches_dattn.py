"""What is remembered of images and of text while answers are written.

`ImageCache` holds an image's keys and values in every layer. They depend on nothing but the image,
so one cache serves any number of prompts. `DAttnCache` is the cache of one `generate` call: the
keys and values of its text, which grow, beside those of its images, which are only read.

This file travels with the exported weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

# What transformers calls the cache in outputs, and in the arguments that `generate` passes.
CACHE_FIELD = next(
    name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__annotations__
)


@dataclass(frozen=True)
class ImageCache:
    """Keys and values of images, as `encode_images` makes them.

    Args:
        keys, values: one tensor per layer, [images, key heads, tokens of an image, head_dim]; keys
            are not rotated, since an image's place in the text is the prompt's.
        entries: which image each `<image>` of a batch stands for, in reading order, int64.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    entries: Tensor

    def __len__(self) -> int:
        return len(self.entries)

    def select(self, numbers: Sequence[int] | Tensor) -> "ImageCache":
        """The entries of these numbers, int64 [n], in that order; nothing is copied.

        Numbers may repeat: `cache.select([0, 0, 0])` lets three prompts ask about the first image.
        """
        index = torch.as_tensor(numbers, device=self.entries.device)
        return ImageCache(self.keys, self.values, self.entries[index])


@dataclass(frozen=True)
class ImagePlaces:
    """Where the images of a batch stand, [batch, slots]: as many slots as one sample has at most.

    Slots beyond a sample's own images have `filled` False.
    """

    number: Tensor  # of the image in the batch's reading order
    column: Tensor  # of its `<image>` in `input_ids`
    position: Tensor  # rotary position of its first token
    filled: Tensor

    @staticmethod
    def find(is_image: Tensor, position: Tensor) -> "ImagePlaces":
        """From where `input_ids` has `<image>`, bool [batch, columns], and each column's rotary
        position, of the same shape."""
        samples, columns = is_image.nonzero(as_tuple=True)
        slots = (is_image.cumsum(1) - 1)[samples, columns]
        shape = (len(is_image), int(is_image.sum(1).max()))

        def table(values: Tensor) -> Tensor:
            filled = torch.zeros(shape, dtype=values.dtype, device=values.device)
            filled[samples, slots] = values
            return filled

        return ImagePlaces(
            number=table(torch.arange(len(samples), device=is_image.device)),
            column=table(columns),
            position=table(position[samples, columns]),
            filled=table(torch.ones_like(samples, dtype=torch.bool)),
        )

    def token_positions(self, tokens_per_image: int) -> Tensor:
        """Rotary positions of all visual tokens, int64 [batch, slots * tokens_per_image]."""
        within = torch.arange(tokens_per_image, device=self.position.device)
        return (self.position.unsqueeze(-1) + within).flatten(1)


@dataclass
class VisualKVCache:
    """The visual tokens of a batch, those of a sample's images one after the other."""

    keys: list[Tensor]  # one per layer, [batch, key heads, tokens, head_dim]
    values: list[Tensor]
    column: Tensor  # [batch, tokens]: column of the token's `<image>`
    is_filled: Tensor  # bool [batch, tokens]

    @staticmethod
    def gather(cache: ImageCache, places: ImagePlaces) -> "VisualKVCache":
        """Every sample's tokens from the cache; keys still without rotation."""
        entries = cache.entries[places.number]
        tokens = cache.keys[0].shape[2]

        def of_samples(states: Tensor) -> Tensor:
            # [batch, slots, heads, tokens, head_dim] -> [batch, heads, slots * tokens, head_dim]
            return states[entries].transpose(1, 2).flatten(2, 3)

        return VisualKVCache(
            [of_samples(key) for key in cache.keys],
            [of_samples(value) for value in cache.values],
            places.column.repeat_interleave(tokens, dim=1),
            places.filled.repeat_interleave(tokens, dim=1),
        )

    def samples(self, index: Tensor) -> "VisualKVCache":
        """The tokens of chosen samples of the batch, int64 [samples]."""
        return VisualKVCache(
            [key[index] for key in self.keys],
            [value[index] for value in self.values],
            self.column[index],
            self.is_filled[index],
        )


class DAttnCache(DynamicCache):
    """Keys and values of a batch's text, which grow, and of its images, which do not."""

    def __init__(self) -> None:
        super().__init__()
        self.visual: VisualKVCache | None = None
        self.is_text: Tensor | None = None  # bool [batch, columns so far]: no padding, no `<image>`

    def extend_text(self, is_text: Tensor) -> Tensor:
        """Append columns; returns all of them, bool [batch, columns]."""
        self.is_text = is_text if self.is_text is None else torch.cat((self.is_text, is_text), 1)
        return self.is_text

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._keep_samples(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep chosen samples, int64 [samples], of text and images."""
        super().batch_select_indices(indices)
        self._keep_samples(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.is_text is not None:
            samples = torch.arange(len(self.is_text), device=self.is_text.device)
            self._keep_samples(samples.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns, as assisted generation does with guesses that it rejects; images
        are never among those."""
        super().crop(tokens_to_remove)
        if self.is_text is not None:
            self.is_text = self.is_text[:, : self.get_seq_length()]

    def _keep_samples(self, index: Tensor) -> None:
        if self.visual is not None and self.is_text is not None:
            self.visual = self.visual.samples(index.to(self.is_text.device))
            self.is_text = self.is_text[index.to(self.is_text.device)]


def given_cache(past_key_values: Any, cache: Any) -> DAttnCache | None:
    """The cache that was given under either name; None for the empty one that `generate` makes.

    Raises:
        ValueError: both were given, or a cache of another kind.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("cache and past_key_values are two names of one argument; pass one")
    given = past_key_values if cache is None else cache
    if given is None or isinstance(given, DAttnCache):
        return given
    is_plain = type(given) is DynamicCache and not getattr(given, "offloading", False)
    if is_plain and given.get_seq_length() == 0:
        return None
    raise ValueError(
        f"the cache is a {type(given).__name__}; this model keeps text and images in a DAttnCache "
        "of its own: leave cache_implementation out, and pass a cache that the model returned"
    )
