"""A small SigLIP vision encoder that learns shapes and colours from easy-VQA's training images.

No published encoder comes with a Python package, so this one is made on the spot, as the
quickstart's is: transformers' own `SiglipVisionModel`, with throw-away heads that name shape and
colour of the image from the mean over its patches. The names are what the training split's
questions say; the test split is not opened.

    python -m examples.smollm2_135m.vision_backbone --package packages/easy_vqa --output siglip
"""

import random
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from examples.quickstart.vision_backbone import preprocess, save_vision
from examples.smollm2_135m.easy_vqa import COLORS, SHAPES, labels, read_rows
from megatron_dattn.errors import EXIT_USER_ERROR, UserError
from megatron_dattn.runtime.tool import ToolParser

IMAGE_SIZE = 64
# 16 patches. Smaller ones would be as many tokens more for the language model.
PATCH_SIZE = 16
BATCH_SIZE = 64
PEAK_LR = 3e-3
UNKNOWN = -100


def vision_config() -> SiglipVisionConfig:
    """The encoder's shape: four layers of width 64; LLaVA-style models read the third."""
    return SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )


def read_images(package: Path) -> tuple[Tensor, Tensor]:
    """Training images fp32 [n, 3, 64, 64], and shape and colour of each, int64 [n, 2]."""
    pixels, names = [], []
    for image, label in sorted(labels(read_rows(package, "train")).items()):
        with Image.open(package / "data" / "train" / "images" / f"{image}.png") as opened:
            pixels.append(preprocess(opened.convert("RGB"), IMAGE_SIZE))
        names.append(
            (
                SHAPES.index(label.shape) if label.shape else UNKNOWN,
                COLORS.index(label.color) if label.color else UNKNOWN,
            )
        )
    return torch.from_numpy(np.stack(pixels)), torch.tensor(names)


class Heads(nn.Module):
    """Name shape and colour from two layers: the last, and the one that LLaVA-style models use."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (len(SHAPES), len(COLORS))
        self.layers = nn.ModuleList(nn.Linear(width, sum(sizes)) for _ in range(2))
        self.sizes = sizes

    def forward(self, model: SiglipVisionModel, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Logits of shape fp32 [n, 3] and colour fp32 [n, 8], a pair for each layer.

        Args:
            pixels: fp32 [n, 3, 64, 64].
        """
        output = model(pixel_values=pixels, output_hidden_states=True)
        features = (output.last_hidden_state, output.hidden_states[-2])
        logits = [layer(one.mean(1)) for layer, one in zip(self.layers, features, strict=True)]
        return [one.split(self.sizes, dim=-1) for one in logits]


def mirrored(pixels: Tensor, rng: random.Random) -> Tensor:
    """Flip and turn pictures fp32 [n, 3, s, s]: shapes and colours stay what they are."""
    axes = [axis for axis in (2, 3) if rng.random() < 0.5]
    pixels = pixels.flip(axes) if axes else pixels
    return pixels.transpose(2, 3) if rng.random() < 0.5 else pixels


def pretrain_vision(
    pixels: Tensor, names: Tensor, *, seed: int, steps: int, checked: int = 200
) -> SiglipVisionModel:
    """Make and train the encoder; prints what it names right on images that it does not train on.

    Args:
        pixels: fp32 [n, 3, 64, 64].
        names: int64 [n, 2]; UNKNOWN where nothing is known.
        checked: images that it does not train on.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"vision/{seed}")
    model = SiglipVisionModel(vision_config())
    heads = Heads(model.config.hidden_size)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK_LR, total_steps=steps, pct_start=0.1
    )
    order = list(range(len(pixels)))
    rng.shuffle(order)
    held, train = order[:checked], order[checked:]
    for step in range(1, steps + 1):
        chosen = rng.sample(train, min(BATCH_SIZE, len(train)))
        logits = heads(model, mirrored(pixels[chosen], rng))
        loss = sum((loss_of(pair, names[chosen]) for pair in logits), torch.tensor(0.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps:
            shape, color = named_right(model, heads, pixels[held], names[held])
            print(
                f"vision step {step}/{steps}: loss {loss.item():.3f}; of {len(held)} training "
                f"images set aside, shape {shape:.1%}, colour {color:.1%}",
                flush=True,
            )
    return model.eval()


def loss_of(logits: tuple[Tensor, Tensor], names: Tensor) -> Tensor:
    """Cross-entropy of a layer's logits (fp32 [n, 3], fp32 [n, 8]), summed; fp32 [].

    Args:
        names: int64 [n, 2]; at least one shape and one colour must be known.
    """
    return sum(
        (nn.functional.cross_entropy(one, names[:, i]) for i, one in enumerate(logits)),
        torch.tensor(0.0),
    )


@torch.no_grad()
def named_right(
    model: SiglipVisionModel, heads: Heads, pixels: Tensor, names: Tensor
) -> tuple[float, float]:
    """Shares of shapes and of colours named right from the last layer but one, of those known.

    Args:
        pixels: fp32 [n, 3, 64, 64].
        names: int64 [n, 2].
    """
    pair = heads(model, pixels)[1]
    shares = []
    for column, logits in enumerate(pair):
        known = names[:, column] != UNKNOWN
        shares.append((logits.argmax(-1) == names[:, column])[known].float().mean().item())
    return shares[0], shares[1]


def main() -> int:
    parser = ToolParser(__doc__)
    parser.add_argument("--package", type=Path, required=True, help="folder of package easy_vqa")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    try:
        pixels, names = read_images(options.package)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    save_vision(
        pretrain_vision(pixels, names, seed=options.seed, steps=options.steps), options.output
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
