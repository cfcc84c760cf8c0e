"""Anyres tiles are LLaVA-NeXT's: the resolution, their number, and their pixels to the bit."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaNextImageProcessorPil
from transformers.image_processing_utils import select_best_resolution

from megatron_dattn.data.image_tiles import best_resolution, grid_pinpoints, num_tiles
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.errors import ConfigError
from tests.unit.data.test_image_decoding import encoded, noise

SIDE = 16
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SQUARE = {"height": SIDE, "width": SIDE}
# By kind: what Hugging Face's processor and ours are given.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "siglip": (
        {
            "size": SQUARE,
            "do_center_crop": False,
            "crop_size": SQUARE,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        {},
    ),
    "clip": (
        {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE},
        {"mean": CLIP_MEAN, "std": CLIP_STD},
    ),
}
sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))
grids = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6)


def theirs(kind: str, pinpoints: Any, **changes: Any) -> LlavaNextImageProcessorPil:
    given = KINDS[kind][0]
    resolutions = [list(each) for each in pinpoints]
    return LlavaNextImageProcessorPil(image_grid_pinpoints=resolutions, **given, **changes)


def ours(kind: str = "siglip", pinpoints: Any = None) -> ImagePreprocessor:
    options = KINDS[kind][1]
    return ImagePreprocessor(SIDE, image_fit="anyres", image_grid_pinpoints=pinpoints, **options)


@given(st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)), grids)
def test_the_resolution_is_hugging_face_s(size: tuple[int, int], grid: Any) -> None:
    pinpoints = [(384 * rows, 384 * columns) for rows, columns in grid]
    expected = select_best_resolution((size[1], size[0]), pinpoints)
    assert best_resolution(size, pinpoints) == expected


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(size=sizes, grid=st.none() | grids)
def test_tiles_are_hugging_face_s_to_the_bit(kind: str, size: tuple[int, int], grid: Any) -> None:
    pinpoints = grid and [[SIDE * rows, SIDE * columns] for rows, columns in grid]
    processor = ours(kind, pinpoints)
    resolutions = processor.resolutions
    assert resolutions is not None
    image = noise(*size)
    data = encoded(image)
    squares = processor.squares(data)
    assert len(squares) == processor.num_squares(data) <= processor.max_squares
    raw = theirs(kind, resolutions, do_rescale=False, do_normalize=False)
    expected = raw(images=image, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(np.stack(squares).transpose(0, 3, 1, 2), expected)
    floats = theirs(kind, resolutions)(images=image, return_tensors="pt")["pixel_values"]
    # Both start from the same bytes; one rounding of float32 per step may differ.
    torch.testing.assert_close(processor.normalise(squares), floats[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [336, 384])
def test_the_default_resolutions_are_llava_next_s(side: int) -> None:
    own = LlavaNextImageProcessorPil.image_grid_pinpoints
    expected = [(rows * side // 336, columns * side // 336) for rows, columns in own]
    assert list(grid_pinpoints(None, side)) == expected
    assert {num_tiles(each, side) for each in expected} == {2, 3, 4}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_tiles_are_counted_and_cut_upright(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(90, 30), format, exif=exif)
    squares = ours(pinpoints=[[SIDE, 3 * SIDE], [4 * SIDE, SIDE]]).squares(data)
    processor = ours(pinpoints=[[SIDE, 3 * SIDE], [4 * SIDE, SIDE]])
    assert len(squares) == processor.num_squares(data) == (4 if orientation < 5 else 5)


@pytest.mark.parametrize(
    ("pinpoints", "text"),
    [
        ([[16, 24]], r"has \[16, 24\]; .* multiples of the encoder's 16 pixels"),
        ([[0, 16]], r"has \[0, 16\]"),
        ([[16]], r"has \[16\]"),
        ([[16, 16, 16]], r"has \[16, 16, 16\]"),
        ([[16 * 65, 16]], "at most 64 tiles"),
        ([], "is empty"),
    ],
)
def test_resolutions_that_are_no_tiles_are_refused(pinpoints: list[list[int]], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ours(pinpoints=pinpoints)
