"""What processors of logits see of a prompt with images."""

import torch
from transformers import LogitsProcessorList

from megatron_dattn.hf.columns_dattn import TextProcessors

IMAGE = 5  # the first id behind a vocabulary of five


def looked_up(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """As transformers 5.10 makes repetitions less likely."""
    return scores.scatter(1, input_ids, scores.gather(1, input_ids) - 1)


def test_the_first_token_stands_where_an_image_does():
    processors = TextProcessors(LogitsProcessorList([looked_up]))
    processors.image_token_id = IMAGE
    ids = torch.tensor([[1, 3, IMAGE, 3], [0, IMAGE, IMAGE, 2], [IMAGE, 2, 2, 2]])
    scores = processors(ids, torch.zeros(3, 5))
    # Where a prompt begins with an image it is the vocabulary's last one.
    lowered = [[1, 3], [0, 2], [2, 4]]
    assert [row.nonzero().flatten().tolist() for row in scores] == lowered
