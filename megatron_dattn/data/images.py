"""Preparing images for SigLIP or CLIP: each becomes a square of the encoder's size, or several.

Pixels are what Hugging Face's processors make of them, computed with Pillow alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_dattn.batch import normalise_pixels
from megatron_dattn.data.image_decoding import decode_image, image_size
from megatron_dattn.data.image_settings import ImageFit, read_image_settings
from megatron_dattn.data.image_tiles import (
    Resolution,
    best_resolution,
    cut_tiles,
    grid_pinpoints,
    num_tiles,
)
from megatron_dattn.data.rejection import Reason, SampleError

_PIXELS_AT_A_TIME = 2**20  # of a band that is made a square


@dataclass(frozen=True)
class ImagePreprocessor:
    """SigLIP's or CLIP's preprocessing: make it squares, scale to [0, 1], normalise.

    The steps are split: `squares` leaves bytes, which are small to keep and to send; the floats are
    made of them where the model runs, or here by `normalise`.
    """

    image_size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC
    image_fit: ImageFit = "resize"
    """How an image becomes a square: stretched ("resize", SigLIP's way), cut out of its middle
    ("crop", CLIP's), or filled up with the mean colour ("pad", LLaVA-1.5's training); or several:
    stretched, and then its tiles ("anyres", LLaVA-NeXT's)."""
    max_pixels: int = 40_000_000
    image_grid_pinpoints: Sequence[Sequence[int]] | None = None
    """Height and width of the resolutions that "anyres" chooses from; LLaVA-NeXT's where None."""
    video_frames: int = 8
    """The most that are taken of a video."""

    @classmethod
    def from_folder(
        cls,
        folder: str,
        *,
        image_size: int,
        image_fit: ImageFit | None = None,
        max_pixels: int,
        image_grid_pinpoints: Sequence[Sequence[int]] | None = None,
        video_frames: int = 8,
    ) -> "ImagePreprocessor":
        """Read the settings from Hugging Face's preprocessor_config.json.

        Args:
            image_fit: how to make a square; the processor's own way where None.

        Raises:
            ConfigError: there is none, it is of another kind, its size is not the model's, or tiles
                have another one.
        """
        settings, own_fit = read_image_settings(Path(folder), image_size)
        return cls(
            image_size=image_size,
            mean=tuple(settings["image_mean"]),
            std=tuple(settings["image_std"]),
            rescale_factor=settings["rescale_factor"],
            resample=settings["resample"],
            image_fit=image_fit or own_fit,
            max_pixels=max_pixels,
            image_grid_pinpoints=image_grid_pinpoints,
            video_frames=video_frames,
        )

    def __post_init__(self) -> None:
        grid_pinpoints(self.image_grid_pinpoints, self.image_size)  # or it is an error now

    @cached_property
    def resolutions(self) -> tuple[Resolution, ...] | None:
        """Those that "anyres" chooses from; None where an image is one square."""
        if self.image_fit != "anyres":
            return None
        return grid_pinpoints(self.image_grid_pinpoints, self.image_size)

    @property
    def max_squares(self) -> int:
        """The most squares that an image becomes."""
        tiles = [num_tiles(each, self.image_size) for each in self.resolutions or ()]
        return 1 + max(tiles, default=0)

    def num_squares(self, data: bytes) -> int:
        """Number of squares that a file becomes, from its headers. Raises as `squares`."""
        if self.resolutions is None:
            return 1
        size = image_size(data, max_pixels=self.max_pixels)
        return 1 + num_tiles(best_resolution(size, self.resolutions), self.image_size)

    def squares(self, data: bytes) -> list[np.ndarray]:
        """Decode a file and bring it to size: the image, and behind it its tiles if it has any.

        Returns:
            uint8 [image_size, image_size, 3] each.

        Raises:
            SampleError: the file cannot be used.
        """
        image = decode_image(data, max_pixels=self.max_pixels)
        if self.resolutions is None:
            return [self.square(image)]
        best = best_resolution(image.size, self.resolutions)
        tiles = cut_tiles(image, best, self.image_size, self.resample)
        return [self.square(image), *map(np.asarray, tiles)]

    def square(self, image: Image.Image) -> np.ndarray:
        """An RGB image at the encoder's size, uint8 [image_size, image_size, 3].

        Raises:
            SampleError: the image is too narrow a band to crop.
        """
        if self.image_fit == "crop":
            return np.asarray(self._cropped(image))
        if self.image_fit == "pad":
            red, green, blue = (int(255 * value) for value in self.mean)
            square = padded_square(image, self.image_size, (red, green, blue), self.resample)
            return np.asarray(square)
        if image.size != (self.image_size, self.image_size):
            image = image.resize((self.image_size, self.image_size), self.resample)
        return np.asarray(image)

    def _cropped(self, image: Image.Image) -> Image.Image:
        """The middle of the image, whose shorter side becomes the square's.

        Raises:
            SampleError: the image is so narrow that at this size it would be beyond the limits.
        """
        side, short = self.image_size, min(image.size)
        width, height = (int(side * length / short) for length in image.size)
        if width * height > self.max_pixels:
            raise SampleError(
                Reason.BROKEN_IMAGE,
                f"the image has {image.width}x{image.height} pixels, too narrow a band to cut a "
                "square from",
            )
        left, top = (width - side) // 2, (height - side) // 2
        if (width, height) != image.size:
            image = image.resize((width, height), self.resample)
        return image.crop((left, top, left + side, top + side))

    def normalise(self, images: list[np.ndarray]) -> torch.Tensor:
        """Float32 [num_images, 3, image_size, image_size] from the results of `squares`."""
        return normalise_pixels(self.stack(images), self.pixel_scale)

    def stack(self, images: list[np.ndarray]) -> torch.Tensor:
        """uint8 [num_images, 3, image_size, image_size] from the results of `squares`."""
        pixels = np.empty((len(images), 3, self.image_size, self.image_size), np.uint8)
        for place, image in zip(pixels, images, strict=True):
            place[:] = image.transpose(2, 0, 1)
        return torch.from_numpy(pixels)

    @property
    def pixel_scale(self) -> torch.Tensor:
        """Factor and shift of each channel, float32 [2, 3]; see `normalise_pixels`."""
        std = np.array(self.std)
        scale = np.stack((self.rescale_factor / std, np.array(self.mean) / std))
        return torch.from_numpy(scale.astype(np.float32))


def padded_square(
    image: Image.Image, size: int, fill: tuple[int, int, int], resample: int
) -> Image.Image:
    """An RGB image, filled up to a square and resized to [size, size], as LLaVA-1.5 does it.

    The square is never made at its own size: a line of 16384 pixels would become one of 1 GB.
    Pillow resizes rows first and then the columns of the result, in bytes. Done apart, the pixels
    are the same to the bit, and the padding above and below is only ever `size` wide.
    """
    side = max(image.size)
    narrow = _resized_rows(image, side, size, fill, resample)
    column = Image.new("RGB", (size, side), fill)
    column.paste(narrow, (0, (side - image.height) // 2))
    return column.resize((size, size), resample)


def _resized_rows(
    image: Image.Image, side: int, size: int, fill: tuple[int, int, int], resample: int
) -> Image.Image:
    """Each row, filled up to `side` pixels, with `size` pixels; some rows at a time."""
    if image.width == side:
        return image.resize((size, image.height), resample)
    narrow = Image.new("RGB", (size, image.height))
    count = max(1, _PIXELS_AT_A_TIME // side)
    for top in range(0, image.height, count):
        bottom = min(top + count, image.height)
        rows = Image.new("RGB", (side, bottom - top), fill)
        rows.paste(image.crop((0, top, image.width, bottom)), ((side - image.width) // 2, 0))
        narrow.paste(rows.resize((size, bottom - top), resample), (0, top))
    return narrow
