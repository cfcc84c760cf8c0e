"""Encoding a pack's images side by side: each tensor-parallel rank takes a share of them.

Cut over ranks by its weights, an encoder sums what the ranks computed twice per layer in either
direction: many small messages. Here each rank has all of the encoder and some of the images, and
only the features meet, once. As under data parallelism the encoder's gradients are then each
rank's own and have to be summed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _coalescing_manager


@dataclass(frozen=True)
class ImageShares:
    """The images of a pack over the ranks of one tensor-parallel group.

    Every rank takes equally many: where they run out, blank ones fill up, which nobody reads.
    """

    group: dist.ProcessGroup

    def take(self, images: Tensor) -> Tensor:
        """This rank's share of what is equal on every rank, [images, ...] -> [share, ...]; same
        dtype."""
        share = -(-images.shape[0] // self.group.size())
        own = images[self.group.rank() * share :][:share]
        missing = share - own.shape[0]
        return torch.cat((own, own.new_zeros(missing, *own.shape[1:]))) if missing else own

    def gather(self, own: Tensor, num_images: int) -> Tensor:
        """Join what the ranks made of their shares, on every rank.

        [share, ...] -> [images, ...]; same dtype.

        The gradient that comes back must be equal on every rank too; each takes its share of it.
        """
        return _Gather.apply(own, num_images, self)

    def sum_gradients(self, gradients: Iterable[Tensor]) -> None:
        """Sum gradients of any shapes and one dtype over the ranks, in place; collective."""
        with _coalescing_manager(self.group):  # as one message, without a copy
            for gradient in gradients:
                dist.all_reduce(gradient, group=self.group)

    @torch.no_grad()
    def share_values(self, module: nn.Module) -> None:
        """Give every rank the first one's parameters; collective."""
        first = dist.get_global_rank(self.group, 0)
        for parameter in module.parameters():
            dist.broadcast(parameter, src=first, group=self.group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, num_images: int, shares: ImageShares) -> Tensor:
        ctx.shares = shares
        whole = own.new_empty(shares.group.size() * own.shape[0], *own.shape[1:])
        dist.all_gather_into_tensor(whole, own.contiguous(), group=shares.group)
        return whole[:num_images]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.shares.take(grad), None, None
