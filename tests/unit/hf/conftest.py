"""Exports of tiny models, the runs they come from, and two pictures to ask about."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from megatron_dattn.conversion.hf_export.run import ExportOptions, export_checkpoint
from tests.support.run_folders import make_run_folder
from tests.unit.conversion.hf_models import save_language, save_vision


class Case(NamedTuple):
    """A model to export."""

    preset: str
    vision: str = "siglip"
    language: str = "mistral"
    adapter: Mapping[str, Any] = {}


# Every axis that an export can have (all merges, biased T2V with a gap, V2V "none" and the causal
# scope, the authors' later positions, rows projected anew), every place of the adapter's norm and
# every family, in various pairs.
CASES = {
    "dattn": Case("dattn"),
    "dattn_tanh": Case(
        "dattn_tanh",
        language="mistral-v0.1",
        adapter={"norm": "behind", "visual_position": "per_patch"},
    ),
    "dattn_sum": Case(
        "dattn_sum",
        "clip",
        "llama",
        {"norm": "both", "visual_position": "per_patch", "num_places": 5},  # resized to 3 x 3
    ),
    "naavit": Case("naavit", "clip", "mistral-v0.1"),
    "vidi": Case("vidi", language="llama"),
    "dattn-gemma2": Case("dattn", language="gemma2"),
    "dattn_biased": Case("dattn_biased", language="gemma2"),
    "dattn_sigmoid": Case("dattn_sigmoid", "clip", "gemma2", {"norm": "none"}),
    "dattn_cascade": Case("dattn_cascade", language="gemma2"),
    "saisa": Case("saisa", "clip", "gemma2"),
    "dattn-qwen2": Case("dattn", language="qwen2"),
    "dattn_biased-qwen2": Case("dattn_biased", "clip", "qwen2"),
    "saisa-qwen2": Case("saisa", language="qwen2"),
    "dattn_sum-qwen3": Case("dattn_sum", language="qwen3"),
    "vidi-qwen3": Case("vidi", "clip", "qwen3"),
    "dattn_cascade-qwen3": Case("dattn_cascade", language="qwen3"),
}
# Windows are shorter than the questions; 67 tokens are padded in training; some heads are tied.
LANGUAGES = {
    "mistral": {"family": "mistral"},
    "mistral-v0.1": {"family": "mistral", "sliding_window": 5, "tie_word_embeddings": True},
    "llama": {"family": "llama", "vocab_size": 67},
    "gemma2": {"family": "gemma2", "vocab_size": 67},
    "qwen2": {"family": "qwen2", "vocab_size": 67, "tie_word_embeddings": True},
    "qwen3": {"family": "qwen3", "tie_word_embeddings": True},
}

QUESTIONS = ["what is this?", "a longer question about it.", "why?", "what of these?"]
IMAGES = [[], [0], [1, 0], [1]]  # of each question, by number


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of everything, with `run-CASE` and `hf-CASE` made when asked for."""
    base = tmp_path_factory.mktemp("hf")
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / f"{index}.png")
    (base / "questions.json").write_text(json.dumps(messages(base)))
    return base


@pytest.fixture(scope="session")
def exported(base):
    """The two folders of a case: the run's and the export's."""

    def export(name):
        run, output, case = base / f"run-{name}", base / f"hf-{name}", CASES[name]
        if not output.exists():
            make_run_folder(originals(base, case), run, case.preset, **case.adapter)
            export_checkpoint(run, output, ExportOptions(max_shard_bytes=100_000))
        return run, output

    return export


def originals(base, case):
    """The folder of the encoder's and the language model's folders."""
    folder = base / f"{case.vision}-{case.language}"
    if not folder.exists():
        save_vision(folder / "vision", family=case.vision, varied=True)
        save_language(folder / "language", varied=True, **LANGUAGES[case.language])
    return folder


def messages(base):
    """The questions as chat messages."""
    return [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "path": str(base / f"{number}.png")} for number in numbers),
                    {"type": "text", "text": question},
                ],
            }
        ]
        for question, numbers in zip(QUESTIONS, IMAGES, strict=True)
    ]
