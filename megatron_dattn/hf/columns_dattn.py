"""The columns of `input_ids`: text, `<image>` or padding, and which token answers for each.

This file travels with the exported weights.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList


def token_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """True for columns that are no padding, bool [batch, columns].

    Args:
        attention_mask: bool or int64 [batch, columns], or longer by the columns that are
            already remembered.

    Raises:
        ValueError: it is of another shape: a mask of pairs, or one of other prompts.
    """
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    batch, columns = input_ids.shape
    shape = list(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch or shape[1] < columns:
        raise ValueError(
            f"attention_mask of shape {shape} does not fit input_ids of shape {[batch, columns]}; "
            "it is 1 for tokens and 0 for padding, and who sees whom is the model's own affair"
        )
    return attention_mask[:, -columns:].bool()


def answering_columns(is_text: Tensor) -> Tensor:
    """For every column the last one of text up to it, int64 [batch, columns].

    An image's column, or one of padding, has no token of its own whose logits mean anything: what
    comes after it is what comes after the text before it. Columns before all text are their own.
    """
    column = torch.arange(is_text.shape[1], device=is_text.device).expand_as(is_text)
    last = torch.where(is_text, column, -1).cummax(dim=1).values
    return torch.where(last < 0, column, last)


def check_has_text(is_text: Tensor, is_image: Tensor) -> None:
    """Refuse a prompt of images alone: there is no token that could say what follows.

    Args:
        is_text, is_image: bool [batch, columns].

    Raises:
        ValueError: naming the sample.
    """
    wordless = is_image.any(1) & ~is_text.any(1)
    if wordless.any():
        raise ValueError(
            f"sample {int(wordless.nonzero()[0])} of the batch is <image> without any text; put "
            "the begin token in front, as the chat template does"
        )


class TextProcessors(LogitsProcessorList):
    """Processors of logits, for a model in whose vocabulary `<image>` is not.

    Some look up the logits of the prompt's tokens, to make their repetition less likely. They are
    shown the sample's first token where an image stands.
    """

    image_token_id: int

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Processed scores, [batch, vocabulary], of the same dtype, of int64 ids [batch,
        columns]."""
        shown: Any = torch.where(input_ids == self.image_token_id, input_ids[:, :1], input_ids)
        return super().__call__(shown.clamp(max=scores.shape[-1] - 1), scores, **kwargs)
