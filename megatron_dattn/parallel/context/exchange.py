"""What context-parallel ranks send each other in a layer: nothing but partial results of text.

Forward the log-sum-exps of T text tokens are gathered and their weighted outputs summed, backward
the queries' gradients are. A ring sends T * H values to each of the other ranks, and 2 (R - 1) / R
times T * H * D in each direction (`bytes_per_layer`); visual tokens do not occur.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ContextExchange:
    """The ranks of one context-parallel group."""

    group: dist.ProcessGroup

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def ranks(self) -> int:
        return self.group.size()

    def gather(self, values: Tensor) -> Tensor:
        """Those of every rank, [N, ...] -> [ranks, N, ...], same dtype."""
        whole = values.new_empty(self.ranks * len(values), *values.shape[1:])
        dist.all_gather_into_tensor(whole, values.contiguous(), group=self.group)
        return whole.unflatten(0, (self.ranks, -1))

    def start_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """Begin to sum over the ranks, in place, of any shape and dtype; what waits for the sum.

        Every rank gets the same bits: text, which each computes for itself, must stay the same on
        all of them.
        """
        total = values.contiguous()
        work = dist.all_reduce(total, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return total

        return wait


def bytes_per_layer(
    text_tokens: int, query_heads: int, head_dim: int, ranks: int, *, value_bytes: int = 4
) -> tuple[int, int]:
    """Bytes that a rank sends in a layer, forward and backward, by ring algorithms.

    Args:
        text_tokens: of the pack, padding included.
        query_heads: of this rank.
        value_bytes: of a partial result's values: they are float32.
    """
    log_sum_exps = text_tokens * query_heads * value_bytes
    outputs = log_sum_exps * head_dim
    summed = 2 * (ranks - 1) * outputs // ranks
    return (ranks - 1) * log_sum_exps + summed, summed
