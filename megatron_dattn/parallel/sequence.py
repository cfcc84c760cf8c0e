"""Where the packed tokens are under tensor and sequence parallelism, and how they move.

Under sequence parallelism every tensor-parallel rank holds an equal share of the visual tokens and
an equal share of the text tokens: rank r has `[V_r | T_r]`. Whatever treats the two kinds
differently (queries of text tokens alone, an FFN that visual tokens skip) is then the same amount
of work on every rank, and moves no token of the other kind. Without sequence parallelism every rank
holds all tokens.
"""

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor


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

    # What cuts tokens or gathers them, below, does so with one kind at a time: megatron-core's
    # mappings cut a tensor into equal consecutive pieces, and cut so, [V | T] would give the first
    # ranks visual tokens and the last ones text.

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
        kinds = (part for part in tokens.split((self.visual, self.text)) if part.shape[0])
        return torch.cat([scatter_to_sequence_parallel_region(p, group=self.group) for p in kinds])

    def all_gather(self, local: Tensor) -> Tensor:
        """Local tokens into all tokens, for a column-parallel product; gradients are summed.

        [V_r + T_r, ...] -> [V + T, ...], or text alone, [T_r, ...] -> [T, ...]; same dtype.
        """
        if not self.sequence_parallel:
            # All tokens are here already. What this adds is the all-reduce of their gradient: each
            # rank's product has its own columns (heads, neurons) and sees their share of it only.
            return copy_to_tensor_model_parallel_region(local, group=self.group)
        return torch.cat([self._gather(part) for part in self.split(local) if part.shape[0]])

    def reduce_scatter(self, *partial: Tensor) -> Tensor:
        """Sum what the ranks computed of a row-parallel product, and keep the local tokens.

        Args:
            partial: this rank's terms: of all tokens, [V + T, ...], or of text tokens alone,
                [T, ...], or of both kinds apart, [V, ...] and [T, ...].

        Returns:
            [V_r + T_r, ...], or [T_r, ...] of text tokens alone; same dtype.
        """
        if not self.sequence_parallel:
            joined = partial[0] if len(partial) == 1 else torch.cat(partial)
            return reduce_from_tensor_model_parallel_region(joined, group=self.group)
        kinds = (part for tokens in partial for part in tokens.split(self._kinds(tokens)))
        return torch.cat(
            [
                reduce_scatter_to_sequence_parallel_region(part, group=self.group)
                for part in kinds
                if part.shape[0]
            ]
        )

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
        """Chosen tokens of the pack, [N, ...], equal on every rank.

        The language-model head needs the labelled text tokens only, a small share. So instead of
        gathering everything each rank fills in the chosen tokens it holds and the ranks add up. The
        gradient that comes back must be equal on every rank too (a following column-parallel layer
        that all-reduces its input gradient takes care of that); each rank keeps its tokens' share.

        Args:
            local: this rank's tokens, of both kinds or text alone, [V_r + T_r, ...] or [T_r, ...].
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

    def _kinds(self, tokens: Tensor) -> list[int]:
        """How many of these tokens are visual and text; tokens of one kind are not split."""
        return [self.visual, self.text] if len(tokens) == self.visual + self.text else [len(tokens)]

    def _gather(self, part: Tensor) -> Tensor:
        # True: the backward pass reduce-scatters, because what follows differs by rank (its heads).
        # False would take each rank's piece of its own gradient and drop the others' terms.
        return gather_from_sequence_parallel_region(
            part, tensor_parallel_output_grad=True, group=self.group
        )
