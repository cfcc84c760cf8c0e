"""The attention of text over images that are spread over ranks, each of which has all the text.

A rank computes T2V over its own images. What the ranks found are parts of one softmax: the output
over all images is their sum, each weighted by its share of the exponential mass (equations 7 and 9,
for as many parts as there are ranks). So a layer sends what it has found of each text token, and
not a word about visual tokens, however many there are.

Text is computed by every rank, all alike. Were the gradient of the loss to start on each of them,
text's parameters would get it as many times as there are ranks once they are summed. So each starts
with an equal share of it (`share_gradient`), and what flows back through text is a share
everywhere: its queries' gradients over each rank's images add up to the share of the sum. The one
place where a share has to become the whole is where it leaves text for an image, which no other
rank has: the keys and values of T2V.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dattn.attention.decomposed import JointSoftmax, KeyGradients
from megatron_dattn.attention.merge import alpha_merge, merge_dtype
from megatron_dattn.attention.plan.parts import Part
from megatron_dattn.parallel.context.exchange import ContextExchange


@dataclass(frozen=True)
class ImagesOfAllRanks:
    """Reads the images of all ranks, as `attention.decomposed.ImagesElsewhere` wants it."""

    exchange: ContextExchange

    def attend(
        self, softmax: JointSoftmax, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Output [T, Hq, D] and log-sum-exp [T, Hq], float32 (float64 for float64).

        Args:
            softmax: over this rank's images, and over text if they are one softmax.
            query: of the text tokens, [T, Hq, D], any floating dtype.
            key, value: of this rank's tokens, [S, Hk, D], same dtype.
        """
        images, text = _by_kind(softmax)
        dtype = merge_dtype(query.dtype)
        out, lse = softmax.attend(images, query, key, value, dtype)
        weight, lse = weigh(self.exchange.gather(lse), self.exchange.rank)
        of_all = self.exchange.start_sum(out * weight.unsqueeze(-1))
        if not text:
            return of_all(), lse
        of_text = softmax.attend(text, query, key, value, dtype)  # under the message
        return alpha_merge(of_all(), lse, *of_text)

    def backward(
        self, softmax: JointSoftmax, grad_out: Tensor, saved: Sequence[Tensor]
    ) -> tuple[Tensor, list[KeyGradients]]:
        """The queries' gradient [T, Hq, D], float32 (float64 for float64), and each part's of keys
        and values; arguments as of `JointSoftmax.backward`."""
        images, text = _by_kind(softmax)
        dtype = merge_dtype(grad_out.dtype)
        of_images, keys = softmax.backward(images, grad_out, saved, dtype)
        of_all = self.exchange.start_sum(of_images)
        of_text, text_keys = softmax.backward(text, grad_out, saved, dtype)
        ranks = self.exchange.ranks
        whole = [(ranks * of_key, ranks * of_value) for of_key, of_value in keys]
        return of_all() + of_text, [*whole, *text_keys]


def weigh(lses: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A rank's share of the exponential mass, and the log-sum-exp of all of it.

    Log-sum-exps are [ranks, T, H], of float32 or float64, -inf for tokens that see none of a rank's
    images; the results are [T, H], same dtype. Where no rank has an image to be seen the share is 0
    and the log-sum-exp -inf.
    """
    joint = lses.logsumexp(0)
    own = lses[rank]
    # -inf - -inf is NaN; a NaN that a kernel gave stays.
    return torch.where(own == -torch.inf, 0.0, (own - joint).exp()), joint


def share_gradient(values: Tensor, ranks: int) -> Tensor:
    """The same values, of any shape and floating dtype, whose gradient is divided by the ranks:
    all of them compute the values, and so all together send their gradient back once."""
    shared = _ShareGradient.apply(values, ranks)
    assert isinstance(shared, Tensor)
    return shared


class _ShareGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ranks, None


def _by_kind(softmax: JointSoftmax) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """T2V, and T2T, which comes behind it."""
    num_t2v = sum(part.is_t2v for part in softmax.parts)
    return softmax.parts[:num_t2v], softmax.parts[num_t2v:]
