"""Scenes: digits on a grid of cells, some cells empty, and their rendering as small RGB pictures.

A scene is decided before its handwriting: first which digit stands in which cell, then which
written digit shows it. So text can be made from random scenes without any picture, and a picture of
a split uses that split's handwriting alone. Each cell is 32 pixels wide; the digit inside it varies
in size, place, slant and brightness, and the colours of ink and ground vary per picture.
"""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from examples.quickstart.digits import DigitBank

CELL_SIZE = 32
DIGIT_SIZES = (24, 28)
MAX_ROTATION_DEGREES = 6.0
PLACE_NAMES = {
    2: ("top left", "top right", "bottom left", "bottom right"),
    3: (
        *("top left", "top middle", "top right"),
        *("middle left", "center", "middle right"),
        *("bottom left", "bottom middle", "bottom right"),
    ),
}


@dataclass(frozen=True)
class Scene:
    """Digits in reading order on a `grid` x `grid` board; None marks an empty cell."""

    grid: int
    cells: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if self.grid not in PLACE_NAMES:
            raise ValueError(f"grid {self.grid} is not one of {sorted(PLACE_NAMES)}")
        if len(self.cells) != self.grid**2:
            raise ValueError(f"{len(self.cells)} cells do not fill a grid of {self.grid}")

    @property
    def places(self) -> tuple[str, ...]:
        """The cells' names in reading order."""
        return PLACE_NAMES[self.grid]

    @property
    def digits(self) -> list[int]:
        """The digits present, in reading order."""
        return [digit for digit in self.cells if digit is not None]

    def cell_of(self, digit: int) -> int:
        """The cell that shows `digit`."""
        return self.cells.index(digit)

    def place_of(self, digit: int) -> str:
        """The name of the cell that shows `digit`."""
        return self.places[self.cell_of(digit)]

    def column(self, cell: int) -> int:
        """Column of a cell, counted from the left."""
        return cell % self.grid


def sample_scene(rng: random.Random, grid: int) -> Scene:
    """A random scene of at least one digit; no digit stands there twice (nine cells, ten digits).

    So "where is the 5" has one answer, and the questions stay about seeing.
    """
    num_cells = grid**2
    num_digits = rng.randint(1, num_cells)
    cells: list[int | None] = [None] * num_cells
    places = rng.sample(range(num_cells), num_digits)
    for cell, digit in zip(places, rng.sample(range(10), num_digits), strict=True):
        cells[cell] = digit
    return Scene(grid=grid, cells=tuple(cells))


def _digit_mask(ink: np.ndarray, rng: random.Random) -> Image.Image:
    """One written digit, uint8 [8, 8], as an 8-bit mask of random size and slant."""
    size = rng.randint(*DIGIT_SIZES)
    mask = Image.fromarray(ink).resize((size, size), Image.Resampling.BICUBIC)
    angle = rng.uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES)
    return mask.rotate(angle, resample=Image.Resampling.BILINEAR)


def render_scene(
    scene: Scene, bank: DigitBank, rng: random.Random
) -> tuple[Image.Image, tuple[int, ...]]:
    """Draw a scene with a split's handwriting.

    Returns the RGB picture, 32 * grid pixels square, and the places in scikit-learn's file of the
    digits used (in reading order).
    """
    side = CELL_SIZE * scene.grid
    ground = tuple(rng.randint(0, 70) for _ in range(3))
    ink = tuple(rng.randint(170, 255) for _ in range(3))
    picture = Image.new("RGB", (side, side), ground)
    used = []
    for cell, digit in enumerate(scene.cells):
        if digit is None:
            continue
        row = rng.choice(bank.rows_by_label[digit])
        mask = _digit_mask(bank.images[row], rng)
        strength = rng.uniform(0.8, 1.0)
        mask = mask.point([round(value * strength) for value in range(256)])
        left = scene.column(cell) * CELL_SIZE + rng.randint(0, CELL_SIZE - mask.width)
        top = cell // scene.grid * CELL_SIZE + rng.randint(0, CELL_SIZE - mask.height)
        picture.paste(ink, (left, top), mask)
        used.append(int(bank.indices[row]))
    return picture, tuple(used)
