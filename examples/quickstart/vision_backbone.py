"""A tiny SigLIP vision encoder, taught to read digits before it meets the language model.

The encoder is transformers' own `SiglipVisionModel`. It is pretrained with throw-away heads that
name each cell's digit (or "empty") from the mean of the cell's patches: one head reads the last
layer, one the layer before it, which is the one that LLaVA-style models use. The pictures are drawn
on the way with training handwriting alone. What is saved is an ordinary SigLIP checkpoint.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from examples.quickstart.digits import load_bank
from examples.quickstart.scenes import Scene, render_scene, sample_scene

PIXELS_PER_CELL = 16
PATCH_SIZE = 8
EMPTY = 10
NUM_CLASSES = 11
# Full boards teach more digits per picture; the rest are ordinary scenes with empty cells.
FULL_BOARD_SHARE = 0.8


def vision_config(grid: int) -> SiglipVisionConfig:
    """The encoder's shape: four 64-wide layers, 2 x 2 patches of 8 pixels per cell."""
    return SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=PIXELS_PER_CELL * grid,
        patch_size=PATCH_SIZE,
    )


def preprocess(image: Image.Image, size: int) -> np.ndarray:
    """SigLIP's preprocessing: bicubic to `size`, then values -1..1; float32 [3, size, size]."""
    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0


def picture_batches(
    grid: int, batch_size: int, seed: int, split: str = "train"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (pixels fp32 [n, 3, size, size], classes int64 [n, grid * grid]) of new scenes."""
    rng = random.Random(f"vision/{split}/{seed}/{grid}")
    bank = load_bank(split)
    size = PIXELS_PER_CELL * grid
    while True:
        pixels, classes = [], []
        for _ in range(batch_size):
            scene = sample_scene(rng, grid)
            if rng.random() < FULL_BOARD_SHARE:
                scene = Scene(grid, tuple(rng.randrange(10) for _ in range(grid**2)))
            image, _ = render_scene(scene, bank, rng)
            pixels.append(preprocess(image, size))
            classes.append([EMPTY if digit is None else digit for digit in scene.cells])
        yield torch.from_numpy(np.stack(pixels)), torch.tensor(classes)


def patch_targets(classes: Tensor, grid: int) -> Tensor:
    """Each patch is named after its cell's digit: int64 [n, grid * grid] -> [n, patches]."""
    per_cell = PIXELS_PER_CELL // PATCH_SIZE
    board = classes.unflatten(1, (grid, grid))
    return board.repeat_interleave(per_cell, 1).repeat_interleave(per_cell, 2).flatten(1)


def pretrain_vision(
    grid: int = 2,
    seed: int = 0,
    num_steps: int = 1000,
    batch_size: int = 64,
    peak_lr: float = 4e-3,
    log_every: int = 100,
) -> SiglipVisionModel:
    """Make and train the encoder; prints the share of cells named correctly as it goes."""
    torch.manual_seed(seed)
    model = SiglipVisionModel(vision_config(grid))
    heads = nn.ModuleList(nn.Linear(model.config.hidden_size, NUM_CLASSES) for _ in range(2))
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=peak_lr, total_steps=num_steps, pct_start=0.1
    )
    model.train()
    batches = picture_batches(grid, batch_size, seed)
    for step in range(1, num_steps + 1):
        pixels, classes = next(batches)
        targets = patch_targets(classes, grid).flatten()
        output = model(pixel_values=pixels, output_hidden_states=True)
        features = (output.last_hidden_state, output.hidden_states[-2])
        logits = [head(one).flatten(0, 1) for head, one in zip(heads, features, strict=True)]
        loss = sum((nn.functional.cross_entropy(one, targets) for one in logits), torch.tensor(0.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % log_every == 0 or step == num_steps:
            share = (logits[1].argmax(-1) == targets).float().mean().item()
            print(f"vision step {step}/{num_steps}: loss {loss.item():.3f}, cells {share:.1%}")
    return model.eval()


def save_vision(model: SiglipVisionModel, output: Path) -> None:
    """Save weights, config.json and the preprocessor_config.json that SigLIP checkpoints carry."""
    model.save_pretrained(output)
    size = model.config.image_size
    preprocessor = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "SiglipProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": size, "width": size},
    }
    text = json.dumps(preprocessor, indent=2) + "\n"
    (output / "preprocessor_config.json").write_text(text, encoding="utf-8")
