"""Run folders of tiny models, as a finished stage leaves them, and two pictures to ask about."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_dattn.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from megatron_dattn.conversion.import_hf import import_checkpoint
from megatron_dattn.inference import load_model
from megatron_dattn.models.added_parameters import is_added
from megatron_dattn.models.build import build_model
from megatron_dattn.models.config import ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.runtime.distributed import (
    destroy_distributed,
    initialize_distributed,
    seed_everything,
)
from tests.unit.conversion.hf_models import save_language, save_vision

# The third has fewer rows than patches, the last no adapter.
PRESETS_SHOWN = ["dattn", "s_attn", "fastervlm", "saisa"]


def make_run_folder(base: Path, folder: Path, attention: str) -> None:
    """A run folder as a finished stage leaves it: the imported weights and a random adapter."""
    imported = base / f"imported-{attention}"
    config = import_checkpoint(
        base / "vision", base / "language", imported, attention=attention, dtype="fp32"
    )
    initialize_distributed()
    seed_everything(7)
    model = build_model(config, ParallelConfig(), ExecutionConfig(precision="fp32"))
    found = find_checkpoint(imported)
    loaded = load_checkpoint(
        found.path,
        {"model": model.sharded_state_dict()},
        modules=["vision_model", "language_model"],
        without=is_added,
    )
    model.load_state_dict(loaded["model"], strict=False)
    shutil.copytree(imported / "tokenizer", folder / "tokenizer")
    text = (imported / "config.yaml").read_text() + "training: {precision: fp32}\n"
    (folder / "config.yaml").write_text(text)
    modules = ["vision_model", "adapter", "language_model"]
    facts = {**found.manifest.facts, "modules": modules}
    save_checkpoint(folder, 1, {"model": model.sharded_state_dict()}, facts=facts)
    destroy_distributed()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("generate")
    save_vision(base / "vision")
    language = save_language(base / "language")
    for preset in PRESETS_SHOWN:
        make_run_folder(base, base / preset, preset)
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 255, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / f"{index}.png")
    return base, language


@pytest.fixture(params=PRESETS_SHOWN)
def loaded(base, request):
    yield load_model(base[0] / request.param)
    destroy_distributed()
