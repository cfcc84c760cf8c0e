"""Ragged segments as a few dense batches, for kernels that know no ragged lengths.

A part of the attention is a list of segments of different lengths. Calling a kernel once per
segment costs more than the arithmetic when segments are short; padding everything to the longest
wastes arithmetic when they are not alike. So neighbouring segments share a padded batch as long as
the padding stays small.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from megatron_dattn.attention.transfer import to_device

# A batch may compute this many times the scores its segments need...
_MAX_WASTE = 1.5
# ...plus this many scores: about what one more kernel call costs.
_FREE_SCORES = 20_000


@dataclass(frozen=True)
class PaddedTokens:
    """The tokens `start ..` of a ragged tensor, laid out as `[batch, width]` with padding behind.

    Padding repeats the segment's last token. A last query's softmax covers every key of its
    segment, so probabilities that a backward pass recomputes in padding stay within 1, whatever the
    scores.
    """

    start: int
    lengths: tuple[int, ...]
    width: int
    sources: (
        Tensor | None
    )  # int64 [batch * width]: the token to read at each place; None: no padding
    places: Tensor | None  # int64 [num_tokens]: the place of each token, inverse of `sources`

    @staticmethod
    def build(start: int, lengths: Sequence[int], device: torch.device | str) -> "PaddedTokens":
        width = max(lengths)
        if min(lengths) == width:
            return PaddedTokens(start, tuple(lengths), width, None, None)
        steps = torch.arange(width)
        ends = torch.tensor(lengths).cumsum(0).unsqueeze(1)
        firsts = ends - torch.tensor(lengths).unsqueeze(1)
        sources = torch.minimum(firsts + steps, ends - 1).flatten()
        places = (firsts + steps < ends).flatten().nonzero().flatten()
        sources, places = to_device(sources, device), to_device(places, device)
        return PaddedTokens(start, tuple(lengths), width, sources, places)

    @cached_property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def pad(self, ragged: Tensor) -> Tensor:
        """`[tokens, ...]` to `[batch, width, ...]`, same dtype."""
        tokens = ragged.narrow(0, self.start, self.num_tokens)
        if self.sources is not None:
            tokens = tokens.index_select(0, self.sources)
        return tokens.unflatten(0, (len(self.lengths), self.width))

    def pad_with_zeros(self, ragged: Tensor) -> Tensor:
        """`[tokens, ...]` to `[batch, width, ...]`, same dtype; like `pad`, but padding is zero."""
        tokens = ragged.narrow(0, self.start, self.num_tokens)
        if self.places is not None:
            flat = tokens.new_zeros(len(self.lengths) * self.width, *tokens.shape[1:])
            tokens = flat.index_copy_(0, self.places, tokens)
        return tokens.unflatten(0, (len(self.lengths), self.width))

    def unpad(self, batch: Tensor) -> Tensor:
        """`[batch, width, ...]` back to this batch's own tokens `[num_tokens, ...]`, same dtype."""
        flat = batch.flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)

    def padding(self) -> Tensor | None:
        """True where a place is padding, bool `[batch, width]`; None when there is none."""
        if self.places is None:
            return None
        padding = torch.arange(self.width) >= torch.tensor(self.lengths).unsqueeze(1)
        return to_device(padding, self.places.device)


@dataclass(frozen=True)
class PaddedBatch:
    """Neighbouring segments of a part as one dense problem."""

    queries: PaddedTokens
    keys: PaddedTokens
    key_bias: Tensor | None  # float32 [batch, 1, 1, key width]: -inf for padding, else 0


def padded_batches(
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    causal: bool,
    device: torch.device | str,
) -> tuple[PaddedBatch, ...]:
    """Group neighbouring segments into padded batches.

    Under a causal mask padded keys stand behind every valid query and need no mask of their own.
    """
    query_starts = list(accumulate(query_lengths, initial=0))
    key_starts = list(accumulate(key_lengths, initial=0))
    batches = []
    for first, last in _group(query_lengths, key_lengths):
        queries = PaddedTokens.build(query_starts[first], query_lengths[first:last], device)
        keys = PaddedTokens.build(key_starts[first], key_lengths[first:last], device)
        batches.append(PaddedBatch(queries, keys, None if causal else _key_bias(keys)))
    return tuple(batches)


def _key_bias(keys: PaddedTokens) -> Tensor | None:
    padding = keys.padding()
    if padding is None:
        return None
    bias = torch.zeros(padding.shape, device=padding.device)
    return bias.masked_fill(padding, -torch.inf)[:, None, None, :]


def _group(query_lengths: Sequence[int], key_lengths: Sequence[int]) -> list[tuple[int, int]]:
    """First segment and end of each batch. Segments without queries or without keys, which have no
    score, are in none."""
    groups: list[tuple[int, int]] = []
    first, needed, widest_query, widest_key = 0, 0, 0, 0
    for i, (queries, keys) in enumerate(zip(query_lengths, key_lengths, strict=True)):
        if queries * keys == 0:
            groups.append((first, i))
            first, needed, widest_query, widest_key = i + 1, 0, 0, 0
            continue
        widest_query, widest_key = max(widest_query, queries), max(widest_key, keys)
        needed += queries * keys
        padded = (i + 1 - first) * widest_query * widest_key
        if i > first and padded > _MAX_WASTE * needed + _FREE_SCORES:
            groups.append((first, i))
            first, needed, widest_query, widest_key = i, queries * keys, queries, keys
    groups.append((first, len(query_lengths)))
    return [(start, end) for start, end in groups if start < end]
