"""Which patches of an image enter the decoder: those that the encoder attends to most (FasterVLM).

FasterVLM ranks patches by the attention that the encoder's class token pays them, on average over
its heads. SigLIP has no class token: there a patch counts by the attention it receives on average
over all heads and all patches of its image. Nothing here has a gradient: what is selected is
trained, the selection is not.
"""

import torch
from torch import Tensor

# Scores exist for this many queries at a time: 16 images of 729 patches and 16 heads take 48 MB.
_QUERY_CHUNK = 64


@torch.no_grad()
def attention_received(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """Attention that every token receives, averaged over the given heads and queries.

    Args:
        query: [images, heads, queries, head_dim], any floating dtype, those whose attention counts.
        key: [images, heads, tokens, head_dim], same dtype.
        scale: of the scores; head_dim^-0.5 by default.

    Returns:
        Fp32 (fp64 for fp64 inputs) [images, tokens]; an image's values add up to 1.
    """
    images, heads, asking, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    keys = key.to(dtype).transpose(2, 3)
    received = torch.zeros(images, key.shape[2], dtype=dtype, device=query.device)
    for queries in query.split(_QUERY_CHUNK, dim=2):
        scores = queries.to(dtype) @ keys * scale
        received += scores.softmax(dim=-1).sum(dim=(1, 2))
    return received / (heads * asking)


def most_attended(received: Tensor, count: int) -> Tensor:
    """The `count` patches of each image that receive most, in the order of the image.

    [images, patches] -> int64 [images, count]. Of equals, the earlier ones.
    """
    best = received.argsort(dim=1, descending=True, stable=True)[:, :count]
    return best.sort(dim=1).values


def take_patches(features: Tensor, kept: Tensor) -> Tensor:
    """Features of the kept patches, [images, patches, F] and int64 [images, N] -> [images, N, F] of
    the features' dtype."""
    return features.take_along_dim(kept.unsqueeze(2), dim=1)
