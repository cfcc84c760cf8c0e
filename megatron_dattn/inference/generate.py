"""Greedy generation for several prompts at once.

All prompts form one pack, so text-only prompts and prompts with several images go together. An
image is encoded once per call, whatever the number of prompts about it and of their tokens, and
every new token costs the pass of its own token (`decoding.py`).
"""

from collections.abc import Sequence

import torch

from megatron_dattn.data.conversation import IMAGE_TOKEN
from megatron_dattn.data.tokenizer import token_id
from megatron_dattn.inference.decoding import Decoding
from megatron_dattn.inference.load import LoadedModel
from megatron_dattn.inference.prompt import Prompt


def generate(
    loaded: LoadedModel, prompts: Sequence[Prompt], *, max_new_tokens: int = 64
) -> list[str]:
    """`generate_tokens` as text: the answers without special tokens."""
    return decode(loaded, generate_tokens(loaded, prompts, max_new_tokens=max_new_tokens))


def decode(loaded: LoadedModel, answers: list[list[int]]) -> list[str]:
    """Token ids as text, without special tokens."""
    texts = loaded.tokenizer.batch_decode(list(answers), skip_special_tokens=True)
    return [str(text).strip() for text in texts]


@torch.inference_mode()
def generate_tokens(
    loaded: LoadedModel, prompts: Sequence[Prompt], *, max_new_tokens: int = 64
) -> list[list[int]]:
    """Continue every prompt greedily until the end token or the limit.

    An answer never holds `<image>`: it marks the place of an image that was given.

    Args:
        prompts: as many as fit the device's memory in one forward pass, with keys and values of
            all their tokens in all layers.
        max_new_tokens: of each answer.

    Returns:
        The answers' token ids, in the order of the prompts, with the end token if there was one.

    Raises:
        ConfigError: an image was encoded by another model.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new_tokens < 1:
        return answers
    stop_ids, image_id = loaded.stop_ids, token_id(loaded.tokenizer, IMAGE_TOKEN)
    decoding = Decoding(loaded, prompts)
    running = list(range(len(prompts)))
    logits = decoding.prefill()
    while True:
        logits[:, image_id : image_id + 1] = -torch.inf  # it may lie behind the vocabulary
        for index, token in zip(running, logits.argmax(dim=-1).tolist(), strict=True):
            answers[index].append(token)
        running = [
            i
            for i in running
            if answers[i][-1] not in stop_ids and len(answers[i]) < max_new_tokens
        ]
        if not running:
            return answers
        logits = decoding.decode_step(running, [answers[i][-1] for i in running])
