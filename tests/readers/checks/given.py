"""An export as a reader has it: folder, model, processor, prompts, and what is expected of them."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

REMOTE = {"trust_remote_code": True}
IGNORED, PAD = -100, 2


class Refused(Exception):
    """What an export says it does not do, in its own words."""


class NotSupported(Exception):
    """What a version of transformers does not do with such an export, and is not promised."""


def assert_close(found: Tensor, expected: Tensor, what: str, *, rtol: float, atol: float) -> None:
    """As of torch; the message begins with what was compared."""

    def message(usual: str) -> str:
        return f"{what}: {usual}"

    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, msg=message)


@dataclass
class Given:
    """One export.

    Args:
        folder: the export; pictures lie beside it.
        scratch: a folder for what a check writes.
    """

    folder: Path
    scratch: Path
    expected: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.expected = torch.load(self.folder / "expected.pt")

    @property
    def is_stock(self) -> bool:
        return bool(self.expected["is_stock"])

    @property
    def prompts(self) -> list[dict[str, Any]]:
        return list(self.expected["prompts"])

    @property
    def new_tokens(self) -> int:
        return int(self.expected["new_tokens"])

    def fresh_model(self, folder: Path | None = None) -> Any:
        """The model, newly loaded, for checks that change it."""
        auto = transformers.AutoModelForImageTextToText
        return auto.from_pretrained(folder or self.folder, **REMOTE).eval()

    @cached_property
    def model(self) -> Any:
        return self.fresh_model()

    @cached_property
    def processor(self) -> Any:
        return transformers.AutoProcessor.from_pretrained(self.folder, **REMOTE)

    def picture(self, number: int) -> Image.Image:
        return Image.open(self.folder.parent / f"{number}.png")

    def ids(self, prompt: dict[str, Any]) -> list[int]:
        """As the export's processor writes them: as many `<image>`s as it takes for an image."""
        image, per_image = self.expected["image_id"], self.expected["tokens_per_image"]
        return [i for i in prompt["ids"] for i in [i] * (per_image if i == image else 1)]

    def batch(self, prompts: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Model inputs, padded on the left."""
        rows = [self.ids(prompt) for prompt in prompts]
        width = max(map(len, rows))
        inputs = {
            "input_ids": torch.tensor([[PAD] * (width - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor(
                [[0] * (width - len(row)) + [1] * len(row) for row in rows]
            ),
        }
        pictures = [number for prompt in prompts for number in prompt["pictures"]]
        if pictures:
            inputs["pixel_values"] = self.expected["pixels"][pictures]
        return inputs

    def supervised(self, prompts: list[dict[str, Any]], answers: list[list[int]]) -> Any:
        """A batch of prompts with answers, which alone are labelled."""
        longer = [
            {**prompt, "ids": prompt["ids"] + answer}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        inputs = self.batch(longer)
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        for row, answer in enumerate(answers):
            labels[row, -len(answer) :] = torch.tensor(answer)
        return {**inputs, "labels": labels}

    def generate(self, prompts: list[dict[str, Any]], **options: Any) -> list[list[int]]:
        """New token ids of each prompt, without what follows the end token."""
        inputs = self.batch(prompts)
        tokens = self.model.generate(**inputs, max_new_tokens=self.new_tokens, **options)
        stops = self.model.generation_config.eos_token_id
        return [
            _until_end(row, [stops] if isinstance(stops, int) else stops)
            for row in tokens[:, inputs["input_ids"].shape[1] :].tolist()
        ]


def _until_end(row: list[int], stops: list[int]) -> list[int]:
    ends = [place for place, token in enumerate(row) if token in stops]
    return row[: ends[0] + 1] if ends else row
