"""A chosen list of tokens of a packed tensor, as a slice where it is one and as an index where not.

Most token lists of a plan are contiguous, and a slice reads them without copying. Everything here
is prepared once per micro-batch and shared by all layers.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_dattn.attention.layout import TokenRange

# Token ranges, int64 [n, 2]. NumPy's, as torch would wake its threads for a few thousand numbers.
RangeTable = NDArray[np.int64]


@dataclass(frozen=True)
class TokenIndex:
    """`length` tokens of a tensor's first dimension: from `start` on, or those that `index`
    names."""

    length: int
    start: int = 0
    index: Tensor | None = None  # int64 [length]; tokens may repeat
    indexed: RangeTable | None = None  # what `index` holds, on the host
    # Of every token of the tensor: where it stands in this list (last, if it does so twice), -1 for
    # nowhere, int64 [N]. None if the list is all of them in their order, or N is not known.
    places: Tensor | None = None

    @staticmethod
    def from_ranges(
        ranges: Iterable[TokenRange] | RangeTable, num_tokens: int | None = None
    ) -> "TokenIndex":
        """The tokens of all ranges, one range after the other, for tensors of the host.

        Args:
            num_tokens: of the tensor, to know their `places`.
        """
        table = ranges if isinstance(ranges, np.ndarray) else range_table(ranges)
        joined = _join_adjacent(table)
        if len(joined) <= 1:
            start, end = joined[0].tolist() if len(joined) else (0, 0)
            whole = end - start == num_tokens
            places = None if whole else _places_of(slice(start, end), end - start, num_tokens)
            return TokenIndex(end - start, start=start, places=places)
        starts, ends = joined.T
        lengths = ends - starts
        bounds = lengths.cumsum()
        # Token i of the result is i further than the tokens that all ranges before its own have.
        index = np.arange(bounds[-1]) + (ends - bounds).repeat(lengths)
        places = _places_of(index, len(index), num_tokens)
        return TokenIndex(len(index), 0, torch.from_numpy(index), joined, places)

    def with_tensors(self, function: Callable[[Tensor], Tensor]) -> "TokenIndex":
        """The same tokens with what the function makes of index and places, int64 [n] each."""
        index = None if self.index is None else function(self.index)
        places = None if self.places is None else function(self.places)
        return replace(self, index=index, places=places)

    @property
    def ranges(self) -> RangeTable:
        """The tokens again, as `from_ranges` takes them."""
        if self.indexed is not None:
            return self.indexed
        return range_table([(self.start, self.start + self.length)])

    def take(self, tensor: Tensor) -> Tensor:
        """The tokens of `tensor` [N, ...], [length, ...], same dtype: a view where they are
        contiguous."""
        if self.index is None:
            return tensor.narrow(0, self.start, self.length)
        return tensor.index_select(0, self.index)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Overwrite the tokens of `tensor` [N, ...] with `values` [length, ...], which take on its
        dtype; no token may be listed twice."""
        if self.index is None:
            tensor.narrow(0, self.start, self.length).copy_(values)
        else:
            tensor.index_copy_(0, self.index, values.to(tensor.dtype))

    def add(self, tensor: Tensor, values: Tensor) -> None:
        """Add `values` [length, ...] to the tokens of `tensor` [N, ...], in its dtype; a token
        listed twice receives both."""
        if self.index is None:
            tensor.narrow(0, self.start, self.length).add_(values)
        else:
            tensor.index_add_(0, self.index, values.to(tensor.dtype))


def _places_of(
    tokens: slice | NDArray[np.int64], length: int, num_tokens: int | None
) -> Tensor | None:
    """`TokenIndex.places` of a list; None where the number of the tensor's tokens is not known."""
    if num_tokens is None:
        return None
    places = np.full(num_tokens, -1)
    places[tokens] = np.arange(length)
    return torch.from_numpy(places)


def range_table(ranges: Iterable[TokenRange]) -> RangeTable:
    """Ranges of tokens as an array."""
    return np.array(list(ranges), dtype=np.int64).reshape(-1, 2)


def _join_adjacent(ranges: RangeTable) -> RangeTable:
    """The same tokens in fewer ranges, none of them empty."""
    ranges = ranges[ranges[:, 0] < ranges[:, 1]]
    if len(ranges) <= 1:
        return ranges
    apart = ranges[1:, 0] != ranges[:-1, 1]
    starts = ranges[np.concatenate(((True,), apart)), 0]
    ends = ranges[np.concatenate((apart, (True,))), 1]
    return np.stack((starts, ends), axis=1)
