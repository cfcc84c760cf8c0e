"""The training loss of a batch.

This file travels with the exported weights.
"""

import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100


def next_token_loss(
    logits: Tensor, labels: Tensor, is_text: Tensor, num_items: Tensor | int | None
) -> Tensor:
    """Cross entropy of the next text token of the same sample, float32 [].

    Args:
        logits: of all columns, [batch, columns, vocabulary], any floating dtype.
        labels: int64 [batch, columns]; those of columns that are no text are not read.
        is_text: bool [batch, columns].
        num_items: what the sum is divided by: the labels of the whole batch, which gradient
            accumulation spreads over several calls. The mean over these labels where None.
    """
    sample = is_text.nonzero()[:, 0]
    tokens, targets = logits[is_text][:-1].float(), labels[is_text][1:]
    targets = targets.masked_fill(sample[:-1] != sample[1:], IGNORED_LABEL)
    if num_items is None:
        return F.cross_entropy(tokens, targets, ignore_index=IGNORED_LABEL)
    total = F.cross_entropy(tokens, targets, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)
