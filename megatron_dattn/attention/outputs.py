"""Which token's hidden state predicts the token after each text token."""

import torch
from torch import Tensor

from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.plan.rings import last_of_centre


def output_tokens(layout: TokenLayout, config: AttentionConfig) -> Tensor:
    """The packed token that predicts the label of each text token, int64 [text_budget].

    It is the text token itself, unless visual tokens read the text before them (v2t is not "none"):
    then a text token directly followed by an image would predict the next text token without that
    image, so the image predicts in its place (the last image, if several follow each other), as in
    LLaVA. Its last token does, or under v2v="ring" the last of its centre: the tokens that see all
    of the image. Where visual tokens read no text they know nothing of what was said and cannot
    predict, nor where they are frozen or gone before the last layer; text that sees only earlier
    images then predicts without the one that follows.
    """
    tokens = torch.arange(layout.visual_budget, layout.num_tokens)
    if not config.visual_tokens_predict:
        return tokens
    for image, (start, end) in zip(layout.images, layout.image_tokens, strict=True):
        if image.text_offset == 0:
            continue
        if config.v2v == "ring":
            end = start + last_of_centre(image.grid) + 1
        tokens[layout.text_cu_seqlens[image.sample] + image.text_offset - 1] = end - 1
    return tokens
