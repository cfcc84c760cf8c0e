"""Run folders of tiny models, as a finished stage leaves them, and two pictures to ask about."""

import numpy as np
import pytest
from PIL import Image

from megatron_dattn.inference import load_model
from megatron_dattn.runtime.distributed import (
    destroy_distributed,
)
from tests.support.run_folders import make_run_folder
from tests.unit.conversion.hf_models import save_language, save_vision

# The third has fewer tokens than patches, the last no adapter.
PRESETS_SHOWN = ["dattn", "s_attn", "fastervlm", "saisa"]
CROSS_ATTENTION = "dattn_cascade"


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("generate")
    save_vision(base / "vision")
    language = save_language(base / "language")
    for preset in (*PRESETS_SHOWN, CROSS_ATTENTION):
        make_run_folder(base, base / preset, preset)
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 255, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / f"{index}.png")
    return base, language


@pytest.fixture(params=PRESETS_SHOWN)
def loaded(base, request):
    yield load_model(base[0] / request.param)
    destroy_distributed()
