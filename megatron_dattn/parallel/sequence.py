"""Where the packed tokens are under tensor and sequence parallelism, and how they move.

Under sequence parallelism every tensor-parallel rank holds an equal share of the visual tokens and
an equal share of the text tokens: rank r has `[V_r | T_r]`. Whatever treats the two kinds
differently (queries of text tokens alone, an FFN that visual tokens skip) is then the same amount
of work on every rank, and moves no token of the other kind. Without sequence parallelism every rank
holds all tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.distributed import _coalescing_manager


@dataclass(frozen=True)
class SequenceLayout:
    """A pack's tokens over the ranks of one tensor-parallel group.

    Tensors have tokens in their first dimension. "All tokens" stand in packed order `[V | T]`;
    "local tokens" are this rank's `[V_r | T_r]`.
    """

    visual: int
    """Visual tokens of the pack, padding included; a multiple of the ranks if they are sharded."""
    text: int
    group: torch.distributed.ProcessGroup
    sequence_parallel: bool

    @property
    def ranks(self) -> int:
        """Number of ranks over which the tokens are spread."""
        return self.group.size() if self.sequence_parallel else 1

    @property
    def num_tokens(self) -> int:
        return self.visual + self.text

    @property
    def local_visual(self) -> int:
        return self.visual // self.ranks

    @property
    def local_text(self) -> int:
        return self.text // self.ranks

    def text_alone(self) -> "SequenceLayout":
        """The same tokens without the visual ones."""
        return SequenceLayout(0, self.text, self.group, self.sequence_parallel)

    def split(self, local: Tensor) -> tuple[Tensor, Tensor]:
        """Local tokens into visual and text tokens, as views.

        [V_r + T_r, ...] -> [V_r, ...] and [T_r, ...], same dtype; V_r is 0 if there are no
        visual tokens.
        """
        return local[: local.shape[0] - self.local_text], local[-self.local_text :]

    def scatter(self, tokens: Tensor) -> Tensor:
        """All tokens, equal on every rank, into local tokens; gradients are gathered back.

        [V + T, ...] -> [V_r + T_r, ...], same dtype.
        """
        if not self.sequence_parallel:
            return tokens
        return _Scatter.apply(tokens, self)

    def reduce_scatter(self, *partial: Tensor) -> Tensor:
        """Sum what the ranks computed of a row-parallel product, and keep the local tokens.

        Args:
            partial: this rank's terms: of all tokens, [V + T, ...], or of text tokens alone,
                [T, ...], or of both kinds apart, [V, ...] and [T, ...]; any floating dtype.

        Returns:
            [V_r + T_r, ...], or [T_r, ...] of text tokens alone; same dtype.
        """
        if not self.sequence_parallel:
            joined = partial[0] if len(partial) == 1 else torch.cat(partial)
            return reduce_from_tensor_model_parallel_region(joined, group=self.group)
        return _ReduceScatter.apply(self, *partial)

    def from_rank_order(self, tokens: Tensor) -> Tensor:
        """All tokens as a plain gather lays them, `[V_0 | T_0 | V_1 | T_1 ...]`, in packed
        order; [V + T, ...] -> the same shape and dtype."""
        if self.ranks == 1 or not self.visual:
            return tokens
        shards = tokens.unflatten(0, (self.ranks, -1))
        return torch.cat(
            (
                shards[:, : self.local_visual].flatten(0, 1),
                shards[:, self.local_visual :].flatten(0, 1),
            )
        )

    def to_rank_order(self, tokens: Tensor) -> Tensor:
        """The inverse of `from_rank_order`, [V + T, ...] -> the same shape and dtype."""
        if self.ranks == 1 or not self.visual:
            return tokens
        visual, text = (
            part.unflatten(0, (self.ranks, -1)) for part in tokens.split((self.visual, self.text))
        )
        return torch.cat((visual, text), dim=1).flatten(0, 1)

    def take(self, local: Tensor, tokens: Tensor) -> Tensor:
        """Chosen tokens of the pack, [N, ...] of the local ones' dtype, equal on every rank.

        The language-model head needs the labelled text tokens only, a small share. So instead of
        gathering everything each rank fills in the chosen tokens it holds and the ranks add up. The
        gradient that comes back must be equal on every rank too (a following column-parallel layer
        that all-reduces its input gradient takes care of that); each rank keeps its tokens' share.

        Args:
            local: this rank's tokens, of both kinds or text alone, [V_r + T_r, ...] or [T_r, ...],
                any floating dtype.
            tokens: packed token numbers, int64 [N], equal on every rank; text tokens if `local` has
                no others.
        """
        text = tokens - self.visual
        visual_here = local.shape[0] - self.local_text
        rank = torch.where(text < 0, tokens // max(1, self.local_visual), text // self.local_text)
        place = torch.where(
            text < 0, tokens % max(1, self.local_visual), visual_here + text % self.local_text
        )
        if not self.sequence_parallel:
            return local.index_select(0, place)
        is_here = (rank == self.group.rank()).view(-1, *(1,) * (local.dim() - 1))
        # A foreign token's place names another token here; `where`, so that not even a NaN comes of
        # it.
        chosen = local.index_select(0, place)
        chosen = torch.where(is_here, chosen, chosen.new_zeros(()))
        return reduce_from_tensor_model_parallel_region(chosen, self.group)

    def all_gather(self, local: Tensor) -> Tensor:
        """Local tokens into all tokens, for a column-parallel product.

        Without a gradient: that is the sum over the ranks, `start_reduce_scatter`.

        [V_r + T_r, ...] -> [V + T, ...], or text alone, [T_r, ...] -> [T, ...]; same dtype.
        """
        return self.start_all_gather(local, async_op=False).wait()

    def start_all_gather(self, local: Tensor, *, async_op: bool = True) -> "PendingTokens":
        """`all_gather` that goes on while the caller does.

        [V_r + T_r, ...] -> [V + T, ...], same dtype.
        """
        if not self.sequence_parallel:
            return PendingTokens(local, None)
        local = local.contiguous()
        tokens = local.new_empty(local.shape[0] * self.ranks, *local.shape[1:])
        # megatron-core's mappings cut a tensor into equal consecutive pieces, and cut so, [V | T]
        # would give the first ranks visual tokens and the last ones text. So each kind is a
        # collective of its own; NCCL runs all that is called in here as one, and every kind lands
        # where it belongs: nothing is copied together afterwards.
        with _coalescing_manager(self.group, async_ops=async_op) as work:
            for whole, own in zip(self._kinds(tokens), self.split(local), strict=True):
                if own.shape[0]:
                    dist.all_gather_into_tensor(whole, own, group=self.group)
        return PendingTokens(tokens, work)

    def start_reduce_scatter(self, *partial: Tensor, async_op: bool = True) -> "PendingTokens":
        """`reduce_scatter` that goes on while the caller does, without a gradient.

        [V + T, ...], or [V, ...] and [T, ...] -> [V_r + T_r, ...]; same dtype.
        """
        if not self.sequence_parallel:
            total = partial[0].contiguous() if len(partial) == 1 else torch.cat(partial)
            if self.group.size() == 1:
                return PendingTokens(total, None)
            return PendingTokens(total, dist.all_reduce(total, group=self.group, async_op=async_op))
        partial = tuple(tokens.contiguous() for tokens in partial)
        rows = sum(tokens.shape[0] for tokens in partial) // self.ranks
        local = partial[0].new_empty(rows, *partial[0].shape[1:])
        kinds = partial if len(partial) == 2 else self._kinds(partial[0])
        with _coalescing_manager(self.group, async_ops=async_op) as work:
            for own, whole in zip(self.split(local), kinds, strict=True):
                if own.shape[0]:
                    dist.reduce_scatter_tensor(own, whole, group=self.group)
        return PendingTokens(local, work)

    def _kinds(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens, or text tokens alone, by kind, as views."""
        return tokens[: tokens.shape[0] - self.text], tokens[-self.text :]


class PendingTokens:
    """Tokens on their way between the ranks, so that the device can compute meanwhile.

    A product that is queued between the message and `wait` overlaps it, where
    CUDA_DEVICE_MAX_CONNECTIONS is 1: else the device may begin with the product.
    """

    def __init__(self, tokens: Tensor, work: Any) -> None:
        self._tokens, self._work = tokens, work

    def wait(self) -> Tensor:
        """The tokens, [tokens, ...] of the sender's dtype; what is computed of them waits on the
        device, the host does not."""
        if self._work is not None:
            self._work.wait()
        return self._tokens


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, shards: SequenceLayout) -> Tensor:
        ctx.shards = shards
        rank = shards.group.rank()
        return torch.cat([kind.chunk(shards.ranks)[rank] for kind in shards._kinds(tokens)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.shards.all_gather(grad), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shards: SequenceLayout, *partial: Tensor) -> Tensor:
        ctx.shards, ctx.rows = shards, [tokens.shape[0] for tokens in partial]
        return shards.start_reduce_scatter(*partial, async_op=False).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.shards.all_gather(grad).split(ctx.rows)
