"""Which images of a pack a context-parallel rank has, and the pack as it is then.

Every rank holds all text and a run of neighbouring images, as many as any other rank or one less.
Whole images, because everything about a visual token but what text reads of it happens inside its
image (encoder, adapter, patch selection, positions) or inside the token itself (its layers): nobody
needs a token of another rank's image. To the rank its share is a pack like any other.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.batch import PackedBatch


@dataclass(frozen=True)
class ContextShare:
    """One rank's images of a pack, and all of its text."""

    whole: TokenLayout
    layout: TokenLayout
    """The share as a pack; its visual budget is that of the whole over the ranks."""
    first_image: int
    """Of the whole pack's images."""

    @property
    def end_image(self) -> int:
        return self.first_image + len(self.layout.images)

    def take(self, tokens: Tensor) -> Tensor:
        """This rank's of all tokens of the pack, [tokens, ...] -> [its tokens, ...], same dtype;
        its padding is zero."""
        own = tokens.new_zeros(self.layout.num_tokens, *tokens.shape[1:])
        if self.layout.images:
            start, _ = self.whole.image_tokens[self.first_image]
            num_visual = self.layout.num_visual_tokens
            own[:num_visual] = tokens[start : start + num_visual]
        own[self.layout.visual_budget :] = tokens[self.whole.visual_budget :]
        return own


def share_of(whole: TokenLayout, rank: int, ranks: int) -> ContextShare:
    """The share of a rank.

    Raises:
        ValueError: the rank's part of the visual budget does not hold its images.
    """
    each, rest = divmod(len(whole.images), ranks)
    first = rank * each + min(rank, rest)
    images = whole.images[first : first + each + (rank < rest)]
    layout = replace(whole, images=images, visual_budget=whole.visual_budget // ranks)
    return ContextShare(whole, layout, first)


def take_share(batch: PackedBatch, rank: int, ranks: int) -> PackedBatch:
    """The batch with a rank's images alone."""
    share = share_of(batch.layout, rank, ranks)
    pixels = batch.pixel_values[share.first_image : share.end_image]
    return replace(batch, layout=share.layout, pixel_values=pixels, whole=batch.layout)
