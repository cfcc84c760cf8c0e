"""Greedy generation for several prompts at once.

All running prompts form one pack, so text-only prompts and prompts with several images go together.
Every new token runs the whole pack again: simple, and exact by construction, since it is the
forward pass of training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_dattn.attention import ImageSpan, TokenLayout, output_rows
from megatron_dattn.data.conversation import IMAGE_TOKEN, Conversation, Turn
from megatron_dattn.data.images import read_image_file
from megatron_dattn.data.rejection import SampleError
from megatron_dattn.data.sample import PackedBatch
from megatron_dattn.data.template import TextRows
from megatron_dattn.errors import DataError
from megatron_dattn.inference.load import LoadedModel, RunAssets, model_device


@dataclass(frozen=True)
class Prompt:
    """A question as the model gets it."""

    rows: TextRows
    images: tuple[np.ndarray, ...]  # uint8 [image_size, image_size, 3] each

    @classmethod
    def from_question(
        cls, loaded: RunAssets, question: str, images: Sequence[str | Path] = ()
    ) -> "Prompt":
        """Encode a question about images, which stand in front of it.

        Raises:
            DataError: an image that cannot be used, or control tokens in the question.
        """
        if IMAGE_TOKEN in question:
            raise DataError(f"the question contains {IMAGE_TOKEN}; images are given by their files")
        text = f"{IMAGE_TOKEN}\n" * len(images) + question
        paths = tuple(str(image) for image in images)
        conversation = Conversation((Turn("user", text, len(images)),), paths)
        try:
            rows = loaded.conversations.prompt(conversation)
            pixels = tuple(_read(loaded, Path(image)) for image in images)
        except SampleError as error:
            raise DataError(f"{question!r:.80}: {error}") from error
        return cls(rows, pixels)


def _read(loaded: RunAssets, path: Path) -> np.ndarray:
    return loaded.preprocessor.fit(read_image_file(str(path.parent), path.name))


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

    Args:
        prompts: as many as fit the device's memory in one forward pass.
        max_new_tokens: of each answer.

    Returns:
        The answers' token ids, in the order of the prompts, with the end token if there was one.
    """
    stop_ids = loaded.stop_ids
    answers: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        if not running:
            break
        batch = pack_prompts(loaded, [(prompts[i], answers[i]) for i in running])
        for index, token in zip(running, _next_tokens(loaded, batch), strict=True):
            answers[index].append(token)
        running = [i for i in running if answers[i][-1] not in stop_ids]
    return answers


def _next_tokens(loaded: LoadedModel, batch: PackedBatch) -> list[int]:
    """The likeliest next token of every sample."""
    model, layout = loaded.model, batch.layout
    last = torch.tensor([end - 1 for end in layout.text_cu_seqlens[1:]])
    rows = output_rows(layout, model.attention)[last].to(batch.input_ids.device)
    return model.forward_logits(batch, rows).argmax(dim=-1).tolist()


def pack_prompts(loaded: LoadedModel, samples: Sequence[tuple[Prompt, list[int]]]) -> PackedBatch:
    """Prompts and what was answered so far, in one pack without padding."""
    grid = loaded.config.model.image_grid
    texts = [prompt.rows.input_ids + answer for prompt, answer in samples]
    spans = tuple(
        ImageSpan(sample=index, text_offset=offset, grid=grid)
        for index, (prompt, _) in enumerate(samples)
        for offset in prompt.rows.image_offsets
    )
    images = [image for prompt, _ in samples for image in prompt.images]
    input_ids = torch.tensor([token for text in texts for token in text])
    batch = PackedBatch(
        layout=TokenLayout(
            text_lengths=tuple(len(text) for text in texts),
            images=spans,
            visual_budget=sum(span.num_rows for span in spans),
            text_budget=len(input_ids),
            prompt_lengths=tuple(len(prompt.rows.input_ids) for prompt, _ in samples),
        ),
        input_ids=input_ids,
        labels=torch.full_like(input_ids, -100),
        pixel_values=loaded.preprocessor.normalise(images),
        sample_keys=[str(index) for index in range(len(samples))],
    )
    return batch.to(model_device(loaded.model))
