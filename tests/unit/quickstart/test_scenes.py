"""Scenes have the shape they claim, and their pictures show ink where a digit is."""

import random

import numpy as np
import pytest

from examples.quickstart.digits import load_bank, split_indices
from examples.quickstart.scenes import CELL_SIZE, Scene, render_scene, sample_scene


@pytest.mark.parametrize("grid", [2, 3])
def test_sampled_scenes_vary(grid: int) -> None:
    rng = random.Random(0)
    scenes = [sample_scene(rng, grid) for _ in range(400)]
    assert {len(scene.digits) for scene in scenes} == set(range(1, grid**2 + 1))
    assert all(len(set(scene.digits)) == len(scene.digits) for scene in scenes)
    assert {digit for scene in scenes for digit in scene.digits} == set(range(10))


def test_ink_is_in_occupied_cells_alone() -> None:
    scene = Scene(grid=2, cells=(3, None, None, 8))
    image, used = render_scene(scene, load_bank("train"), random.Random(0))
    assert image.size == (2 * CELL_SIZE, 2 * CELL_SIZE)
    assert len(used) == 2
    pixels = np.asarray(image, dtype=int)
    for cell, digit in enumerate(scene.cells):
        top, left = cell // 2 * CELL_SIZE, cell % 2 * CELL_SIZE
        block = pixels[top : top + CELL_SIZE, left : left + CELL_SIZE]
        spread = np.ptp(block.mean(axis=2))
        # Ink and ground differ by at least 170 - 70 grey levels times the strength of 0.8.
        assert spread > 60 if digit is not None else spread == 0


def test_digits_come_from_the_given_split_and_show_the_scene() -> None:
    rng = random.Random(1)
    for split in ("train", "validation", "heldout"):
        bank, allowed = load_bank(split), split_indices(split)
        label_at = dict(zip(bank.indices.tolist(), bank.labels.tolist(), strict=True))
        for _ in range(30):
            scene = sample_scene(rng, 2)
            _, used = render_scene(scene, bank, rng)
            assert all(place in allowed for place in used)
            assert [label_at[place] for place in used] == scene.digits


@pytest.mark.parametrize(("grid", "cells"), [(4, (None,) * 16), (2, (1, 2, 3))])
def test_impossible_scenes_are_refused(grid: int, cells: tuple[int | None, ...]) -> None:
    with pytest.raises(ValueError, match="grid"):
        Scene(grid=grid, cells=cells)
