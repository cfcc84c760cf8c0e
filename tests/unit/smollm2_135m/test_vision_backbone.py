"""The encoder learns from training images and what their questions say, and from nothing else."""

import random
import shutil
from pathlib import Path

import torch
from transformers import SiglipVisionModel

from examples.quickstart.vision_backbone import save_vision
from examples.smollm2_135m.easy_vqa import COLORS, SHAPES
from examples.smollm2_135m.vision_backbone import (
    UNKNOWN,
    loss_of,
    mirrored,
    pretrain_vision,
    read_images,
    vision_config,
)
from tests.unit.smollm2_135m.package import write_package


def test_images_and_names_come_of_the_training_split(tmp_path: Path) -> None:
    package = write_package(tmp_path / "package", 9)
    shutil.rmtree(package / "data" / "test")
    pixels, names = read_images(package)
    assert pixels.shape == (9, 3, 64, 64)
    assert names[8].tolist() == [8 % len(SHAPES), 8 % len(COLORS)]
    assert torch.equal(pixels[0], -torch.ones(3, 64, 64))  # black


def test_turning_keeps_every_pixel() -> None:
    pixels = torch.randn(2, 3, 4, 4)
    seen = set()
    for seed in range(40):
        turned = mirrored(pixels, random.Random(seed))
        assert torch.equal(turned.flatten().sort().values, pixels.flatten().sort().values)
        seen.add(tuple(turned.flatten().tolist()))
    assert len(seen) == 8


def test_what_is_unknown_costs_nothing() -> None:
    logits = (torch.randn(3, len(SHAPES)), torch.randn(3, len(COLORS)))
    names = torch.tensor([[0, 1], [UNKNOWN, 2], [2, UNKNOWN]])
    known = loss_of((logits[0][[0, 2]], logits[1][:2]), torch.tensor([[0, 1], [2, 2]]))
    assert torch.allclose(loss_of(logits, names), known)


def test_a_few_steps_make_a_checkpoint_that_loads(tmp_path: Path) -> None:
    package = write_package(tmp_path / "package", 12)
    pixels, names = read_images(package)
    model = pretrain_vision(pixels, names, seed=0, steps=20, checked=2)
    save_vision(model, tmp_path / "siglip")
    loaded = SiglipVisionModel.from_pretrained(tmp_path / "siglip")
    assert loaded.config.num_hidden_layers == vision_config().num_hidden_layers
    with torch.no_grad():
        expected = model(pixel_values=pixels[:1]).last_hidden_state
        assert torch.allclose(loaded(pixel_values=pixels[:1]).last_hidden_state, expected)
