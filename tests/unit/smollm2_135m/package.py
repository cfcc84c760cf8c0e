"""A stand-in for the package easy_vqa: its files, with a few pictures and questions."""

import json
from pathlib import Path

from PIL import Image

from examples.smollm2_135m.easy_vqa import COLORS, SHAPES

SIZE = 64


def questions(image: int, shape: str, color: str) -> list[list[str | int]]:
    """One of each type, as the data set words them."""
    other = SHAPES[(SHAPES.index(shape) + 1) % len(SHAPES)]
    return [
        ["what shape is in the image?", shape, image],
        [f"what color is the {shape}?", color, image],
        [f"is there a {other}?", "no", image],
        [f"does the image not contain a {shape}?", "no", image],
        [f"is a {color} shape present?", "yes", image],
        [f"is no {color} shape present?", "no", image],
    ]


def write_package(folder: Path, images: int) -> Path:
    """Images of each split whose colour says their shape."""
    for split in ("train", "test"):
        (folder / "data" / split / "images").mkdir(parents=True)
        rows: list[list[str | int]] = []
        for image in range(images):
            color = COLORS[image % len(COLORS)]
            Image.new("RGB", (SIZE, SIZE), color).save(
                folder / "data" / split / "images" / f"{image}.png"
            )
            rows += questions(image, SHAPES[image % len(SHAPES)], color)
        (folder / "data" / split / "questions.json").write_text(json.dumps(rows))
    return folder
