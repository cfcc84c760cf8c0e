"""Which row's hidden state predicts the token after each text row."""

import torch
from torch import Tensor

from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.plan.rings import image_rings


def output_rows(layout: TokenLayout, config: AttentionConfig) -> Tensor:
    """The packed row that predicts the label of each text row, int64 [text_budget].

    It is the text row itself, unless visual rows read the text before them (v2t is not "none"):
    then a text row directly followed by an image would predict the next text token without that
    image, so the image predicts in its place (the last image, if several follow each other), as in
    LLaVA. Its last row does, or under v2v="ring" the last of its centre: the rows that see all of
    the image. Where visual rows read no text they know nothing of what was said and cannot predict,
    nor where they are frozen or gone before the last layer; text that sees only earlier images then
    predicts without the one that follows.
    """
    rows = torch.arange(layout.visual_budget, layout.num_rows)
    if not config.visual_rows_predict:
        return rows
    for image, (start, end) in zip(layout.images, layout.image_rows, strict=True):
        if image.text_offset == 0:
            continue
        if config.v2v == "ring":
            _, end = image_rings(image, start)[-1][-1]
        rows[layout.text_cu_seqlens[image.sample] + image.text_offset - 1] = end - 1
    return rows
