"""Exports of tiny models, the runs they come from, and two pictures to ask about."""

import json

import numpy as np
import pytest
from PIL import Image

from megatron_dattn.conversion.export_hf import ExportOptions, export_checkpoint
from tests.support.run_folders import make_run_folder
from tests.unit.conversion.hf_models import save_language, save_vision

# Every axis that an export can have: merges and gates, biased T2V with a gap, V2V "none" and the
# causal scope, the authors' later positions.
PRESETS = ["dattn", "dattn_sum", "dattn_biased", "naavit", "dattn_sigmoid", "vidi"]

QUESTIONS = ["what is this?", "a longer question about it.", "why?", "what of these?"]
IMAGES = [[], [0], [1, 0], [1]]  # of each question, by number


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of everything, with `run-PRESET` and `hf-PRESET` made when asked for."""
    base = tmp_path_factory.mktemp("hf")
    save_vision(base / "vision")
    save_language(base / "language")
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / f"{index}.png")
    (base / "questions.json").write_text(json.dumps(messages(base)))
    return base


@pytest.fixture(scope="session")
def exported(base):
    """The two folders of a preset: the run's and the export's."""

    def export(preset):
        run, output = base / f"run-{preset}", base / f"hf-{preset}"
        if not output.exists():
            make_run_folder(base, run, preset)
            export_checkpoint(run, output, ExportOptions(max_shard_bytes=100_000))
        return run, output

    return export


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
