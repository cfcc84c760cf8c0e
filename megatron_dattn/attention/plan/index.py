"""A chosen list of tokens of a packed tensor, as a slice where it is one and as an index where not.

Most token lists of a plan are contiguous, and a slice reads them without copying. Everything here
is prepared once per micro-batch and shared by all layers.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dattn.attention.layout import TokenRange


@dataclass(frozen=True)
class TokenIndex:
    """`length` tokens of a tensor's first dimension: from `start` on, or those that `index`
    names."""

    length: int
    start: int = 0
    index: Tensor | None = None  # int64 [length]; tokens may repeat
    indexed: tuple[TokenRange, ...] = ()  # what `index` holds, on the host

    @staticmethod
    def from_ranges(
        ranges: Iterable[TokenRange], device: torch.device | str = "cpu"
    ) -> "TokenIndex":
        """The tokens of all ranges, one range after the other."""
        joined = _join_adjacent(ranges)
        length = sum(end - start for start, end in joined)
        if len(joined) <= 1:
            return TokenIndex(length, start=joined[0][0] if joined else 0)
        starts, ends = torch.tensor(joined).unbind(1)
        lengths = ends - starts
        # Token i of the result is i further than the tokens that all ranges before its own have.
        index = torch.arange(length) + (ends - lengths.cumsum(0)).repeat_interleave(lengths)
        return TokenIndex(length, index=index.to(device), indexed=tuple(joined))

    @property
    def ranges(self) -> tuple[TokenRange, ...]:
        """The tokens again, as `from_ranges` takes them."""
        return self.indexed if self.index is not None else ((self.start, self.start + self.length),)

    def take(self, tensor: Tensor) -> Tensor:
        """The tokens of `tensor`: a view where they are contiguous."""
        if self.index is None:
            return tensor.narrow(0, self.start, self.length)
        return tensor.index_select(0, self.index)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Overwrite the tokens of `tensor` with `values`; no token may be listed twice."""
        if self.index is None:
            tensor.narrow(0, self.start, self.length).copy_(values)
        else:
            tensor.index_copy_(0, self.index, values.to(tensor.dtype))

    def add(self, tensor: Tensor, values: Tensor) -> None:
        """Add `values` to the tokens of `tensor`; a token listed twice receives both."""
        if self.index is None:
            tensor.narrow(0, self.start, self.length).add_(values)
        else:
            tensor.index_add_(0, self.index, values.to(tensor.dtype))


def _join_adjacent(ranges: Iterable[TokenRange]) -> list[TokenRange]:
    joined: list[TokenRange] = []
    for start, end in ranges:
        if start == end:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined
