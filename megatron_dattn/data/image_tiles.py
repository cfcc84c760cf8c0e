"""LLaVA-NeXT's "anyres": a large image as a small base image and tiles of the encoder's size.

Of some resolutions (grid pinpoints, whole tiles each) the one is taken that keeps most of the
image's pixels and of those the one that wastes least. The image is resized into it with its
proportions, filled up with black, and cut row by row. Pixels and choice are those of Hugging Face's
`LlavaNextImageProcessorPil`. How many tiles an image has follows from its size alone.
"""

import math
from collections.abc import Sequence

from PIL import Image

from megatron_dattn.errors import ConfigError

Resolution = tuple[int, int]
"""Height and width in pixels, as LLaVA-NeXT's settings have it."""

# LLaVA-NeXT's grids, in tiles: for 336 pixels [336, 672], [672, 336], [672, 672], [1008, 336] and
# [336, 1008], and the same multiples of SigLIP's 384.
_DEFAULT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
MAX_TILES = 64


def grid_pinpoints(given: Sequence[Sequence[int]] | None, side: int) -> tuple[Resolution, ...]:
    """The resolutions that a run's settings ask for, LLaVA-NeXT's where they name none.

    Args:
        given: height and width each.
        side: of a tile, in pixels.

    Raises:
        ConfigError: one is not made of whole tiles, or of more than 64.
    """
    if given is None:
        return tuple((rows * side, columns * side) for rows, columns in _DEFAULT_GRIDS)
    for entry in given:
        whole = len(entry) == 2 and all(length > 0 and length % side == 0 for length in entry)
        if not whole or num_tiles((entry[0], entry[1]), side) > MAX_TILES:
            raise ConfigError(
                f"data.image_grid_pinpoints has {list(entry)}; a resolution is [height, width], "
                f"both multiples of the encoder's {side} pixels, and of at most {MAX_TILES} tiles"
            )
    if not given:
        raise ConfigError("data.image_grid_pinpoints is empty; leave it out for LLaVA-NeXT's")
    return tuple((entry[0], entry[1]) for entry in given)


def num_tiles(resolution: Resolution, side: int) -> int:
    """Tiles of a resolution; the base image is none of them."""
    return resolution[0] // side * (resolution[1] // side)


def best_resolution(size: tuple[int, int], pinpoints: Sequence[Resolution]) -> Resolution:
    """LLaVA-NeXT's choice for an image of this width and height, of at least one resolution."""
    width, height = size
    best, most_kept, least_wasted = pinpoints[0], 0, math.inf
    for rows, columns in pinpoints:
        scale = min(columns / width, rows / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = rows * columns - kept
        if kept > most_kept or (kept == most_kept and wasted < least_wasted):
            best, most_kept, least_wasted = (rows, columns), kept, wasted
    return best


def cut_tiles(
    image: Image.Image, resolution: Resolution, side: int, resample: int
) -> list[Image.Image]:
    """An RGB image, resized into a resolution and cut into its tiles, row by row."""
    rows, columns = resolution
    size = _size_inside(image.size, resolution)
    canvas = Image.new("RGB", (columns, rows))
    place = ((columns - size[0]) // 2, (rows - size[1]) // 2)
    canvas.paste(image.resize(size, resample), place)
    return [
        canvas.crop((left, top, left + side, top + side))
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]


def _size_inside(size: tuple[int, int], resolution: Resolution) -> tuple[int, int]:
    """Width and height of an image that is resized into a resolution with its proportions."""
    (width, height), (rows, columns) = size, resolution
    if columns / width < rows / height:
        return columns, min(math.ceil(height * (columns / width)), rows)
    return min(math.ceil(width * (rows / height)), columns), rows
