"""Small exports of every preset that can be exported, and what our own generator says to prompts.

Readers are compared with this: `expected.pt` beside each export.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from examples.quickstart.make_tokenizer import make_tokenizer
from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.layers import output_tokens
from megatron_dattn.conversion.families.exportable import check_exportable, is_llava
from megatron_dattn.conversion.hf_export.run import export_checkpoint
from megatron_dattn.data.template import TextTokens
from megatron_dattn.errors import ConfigError
from megatron_dattn.inference import Prompt, generate_tokens, load_model
from megatron_dattn.inference.load import LoadedModel, read_config
from megatron_dattn.inference.prompt import pack_prompts, read_image
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.runtime.distributed import destroy_distributed
from tests.support.run_folders import make_run_folder
from tests.unit.conversion.hf_models import save_language, save_vision

IMAGE = 10  # `[control_8]` of the quickstart's tokenizer
NEW_TOKENS = 6
# Where images stand: every prompt is ids with IMAGE in them, and the numbers of its pictures.
PROMPTS: dict[str, tuple[list[int], list[int]]] = {
    "first": ([1, 3, IMAGE, 410, 411, 412, 4], [0]),
    "middle": ([1, 3, 309, IMAGE, 420, 421, 4], [1]),
    "last": ([1, 314, 315, IMAGE], [1]),
    "alone": ([1, IMAGE], [0]),
    "two": ([1, 3, IMAGE, 416, IMAGE, 417, 4], [1, 0]),
    "none": ([1, 3, 318, 319, 4], []),
}
QUESTION = "what is it?"  # of the chat message about picture 0
# Taken in turn, so that every family meets several presets.
ENCODERS = ("siglip", "clip")
LANGUAGES: dict[str, dict[str, Any]] = {
    "mistral": {"family": "mistral"},
    "llama": {"family": "llama", "tie_word_embeddings": True},
    "gemma2": {"family": "gemma2"},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "tie_word_embeddings": True},
}


def make_exports(folder: Path) -> list[str]:
    """Make an export of every exportable preset below a folder; returns their names.

    `folder/PRESET` is the export, with `expected.pt` in it; `folder/0.png` and `1.png` are the
    pictures.
    """
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    make_tokenizer(folder / "tokenizer")
    _make_export("s_attn", "siglip", "mistral", folder)
    names = ["s_attn", *_exportable(read_config(folder / "run-s_attn").model)]
    languages = list(LANGUAGES)
    for number, name in enumerate(names[1:]):
        _make_export(name, ENCODERS[number % 2], languages[number % len(languages)], folder)
    return names


def _exportable(model: ModelConfig) -> Iterator[str]:
    """The presets whose exports bring their own code."""
    for name in PRESETS:
        candidate = replace(model, attention=name)
        try:
            check_exportable(candidate)
        except ConfigError:
            continue
        if not is_llava(candidate):
            yield name


def _make_export(preset: str, encoder: str, language: str, folder: Path) -> None:
    base = folder / f"from-{encoder}-{language}"
    if not base.exists():
        save_vision(base / "vision", family=encoder, varied=True)
        save_language(base / "language", varied=True, vocab_size=448, **LANGUAGES[language])
        # A tokenizer as real ones are: sentencepiece's, which begins every text itself.
        shutil.copytree(folder / "tokenizer", base / "language", dirs_exist_ok=True)
    run, export = folder / f"run-{preset}", folder / preset
    # LLaVA's adapter has no norm.
    make_run_folder(base, run, preset, **({"input_norm": False} if preset == "s_attn" else {}))
    export_checkpoint(run, export)
    loaded = load_model(run)
    torch.save(_expected(loaded, folder), export / "expected.pt")
    destroy_distributed()


def _expected(loaded: LoadedModel, folder: Path) -> dict[str, Any]:
    """What readers must find, as tensors and plain values."""
    prompts = [_prompt(loaded, ids, pictures, folder) for ids, pictures in PROMPTS.values()]
    tokens = generate_tokens(loaded, prompts, max_new_tokens=NEW_TOKENS)
    asked = Prompt.from_question(loaded, QUESTION, [folder / "0.png"])
    (answer,) = generate_tokens(loaded, [asked], max_new_tokens=NEW_TOKENS)
    model = loaded.model.model_config
    return {
        "image_id": IMAGE,
        "is_stock": is_llava(model),
        # LLaVA's processor writes a token for every visual token, ours one for an image.
        "tokens_per_image": model.tokens_per_image if is_llava(model) else 1,
        "new_tokens": NEW_TOKENS,
        "prompts": [
            {
                "name": name,
                "ids": ids,
                "pictures": pictures,
                "logits": _logits(loaded, prompt),
                "tokens": answer_tokens,
            }
            for (name, (ids, pictures)), prompt, answer_tokens in zip(
                PROMPTS.items(), prompts, tokens, strict=True
            )
        ],
        "pixels": loaded.preprocessor.normalise(
            [square for n in range(2) for square in read_image(loaded, folder / f"{n}.png")]
        ),
        "question": QUESTION,
        "question_ids": _with_images(asked.tokens),
        "question_tokens": answer,
    }


def _prompt(loaded: LoadedModel, ids: list[int], pictures: Sequence[int], folder: Path) -> Prompt:
    text = [i for i in ids if i != IMAGE]
    places = [number for number, i in enumerate(ids) if i == IMAGE]
    offsets = tuple(place - before for before, place in enumerate(places))
    tokens = TextTokens(text, [-100] * len(text), offsets)
    images = (read_image(loaded, folder / f"{number}.png") for number in pictures)
    return Prompt(tokens, tuple(square for squares in images for square in squares))


def _with_images(tokens: TextTokens) -> list[int]:
    ids = list(tokens.input_ids)
    for before, offset in enumerate(tokens.image_offsets):
        ids.insert(offset + before, IMAGE)
    return ids


@torch.inference_mode()
def _logits(loaded: LoadedModel, prompt: Prompt) -> torch.Tensor:
    """Of what follows each text token, [text tokens, vocabulary]."""
    batch = pack_prompts(loaded, [(prompt, [])])
    tokens = output_tokens(batch.layout, loaded.model.attention)
    return loaded.model.forward_logits(batch, tokens).clone()
