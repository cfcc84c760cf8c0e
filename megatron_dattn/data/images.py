"""Opening images that nobody has checked, and preparing them for SigLIP.

Image files are untrusted input: formats are limited to JPEG, PNG and WEBP (others can start
external programs), sizes are read from the header and refused before anything is decoded, and
truncated files are errors. Pixels are what Hugging Face's SigLIP processor makes of them, computed
with Pillow alone.
"""

import io
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps

from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.errors import ConfigError

# Where Hugging Face keeps an image processor's settings: the file of its own that older exports
# write, and the one that newer exports share with the text's.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_SIDE = 16_384
MAX_FILE_BYTES = 256 * 1024 * 1024

ImageFit = Literal["resize", "pad"]


def read_image_file(root: str, path: str) -> bytes:
    """The bytes of an image below `root`.

    The path may not leave the root; links that the owner put below it are followed.

    Raises:
        SampleError: the file is missing, outside the root, too large, or not a regular file.
    """
    relative = os.path.normpath(path)
    if os.path.isabs(relative) or relative.split(os.sep, 1)[0] == os.pardir or "\0" in path:
        raise SampleError(Reason.MISSING_IMAGE, f"image path {path!r} leaves its image root")
    try:
        # Without O_NONBLOCK, a named pipe would be waited for.
        descriptor = os.open(os.path.join(root, relative), os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise SampleError(Reason.MISSING_IMAGE, f"image {path!r} is not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise SampleError(Reason.BROKEN_IMAGE, f"image {path!r} has {status.st_size} bytes")
            return file.read()
    except OSError as error:
        raise SampleError(
            Reason.MISSING_IMAGE, f"image {path!r} below {root!r}: {error.strerror}"
        ) from error


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """An upright RGB image from the bytes of a file.

    Colours follow Hugging Face's processors: CMYK, palettes and grey are converted, transparency is
    dropped. 16-bit grey keeps its upper 8 bits; of an animation the first frame is taken.

    Raises:
        SampleError: the format is not allowed, the size is beyond the limits, the file is damaged.
    """
    # A process-wide switch that some libraries turn on; half an image is not a sample.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image.size, max_pixels)
        ImageOps.exif_transpose(image, in_place=True)
        return _as_rgb(image)
    except SampleError:
        raise
    except Image.DecompressionBombError as error:
        raise SampleError(Reason.BROKEN_IMAGE, f"the image is too large: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise SampleError(
            Reason.BROKEN_IMAGE, f"not an image in one of the formats {', '.join(FORMATS)}"
        ) from error
    except Exception as error:
        # Pillow's decoders raise whatever their parsers run into (struct.error, SyntaxError,
        # OverflowError, ...). Damaged bytes are the sample's fault, never a reason to stop.
        raise SampleError(
            Reason.BROKEN_IMAGE, f"the image is damaged: {type(error).__name__}: {error}"
        ) from error


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise SampleError(
            Reason.BROKEN_IMAGE,
            f"the image has {width}x{height} pixels; allowed are {max_pixels} pixels "
            f"(data.max_image_pixels) and sides up to {MAX_SIDE}",
        )


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey to 255 when it converts.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class ImagePreprocessor:
    """SigLIP's preprocessing: resize to a square, scale to [0, 1], normalise.

    The steps are split: `fit` leaves bytes, which are small to keep in buffers; `normalise` makes
    the floats when a pack is put together.
    """

    image_size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC
    image_fit: ImageFit = "resize"
    max_pixels: int = 40_000_000

    @classmethod
    def from_folder(
        cls, folder: str, *, image_size: int, image_fit: ImageFit = "resize", max_pixels: int
    ) -> "ImagePreprocessor":
        """Read the settings from Hugging Face's preprocessor_config.json.

        Raises:
            ConfigError: there is none, it is not SigLIP's, or its size is not the model's.
        """
        settings, path = _read_settings(Path(folder))
        kind = str(settings.get("image_processor_type", ""))
        if not kind.startswith("SiglipImageProcessor"):
            raise ConfigError(f"{path} describes '{kind}'; the encoder needs a SigLIP processor")
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if settings.get(step, True) is False:
                raise ConfigError(f"{path} switches {step} off, which SigLIP needs")
        size = settings.get("size", {})
        if (size.get("height"), size.get("width")) != (image_size, image_size):
            raise ConfigError(
                f"{path} resizes to {size}, but the model's vision.image_size is {image_size}"
            )
        return cls(
            image_size=image_size,
            mean=tuple(settings.get("image_mean", cls.mean)),
            std=tuple(settings.get("image_std", cls.std)),
            rescale_factor=settings.get("rescale_factor", cls.rescale_factor),
            resample=settings.get("resample", cls.resample),
            image_fit=image_fit,
            max_pixels=max_pixels,
        )

    def fit(self, data: bytes) -> np.ndarray:
        """Decode a file and bring it to size. Returns uint8 [image_size, image_size, 3]."""
        image = decode_image(data, max_pixels=self.max_pixels)
        if self.image_fit == "pad":
            side, fill = max(image.size), tuple(int(255 * value) for value in self.mean)
            square = Image.new("RGB", (side, side), fill)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        if image.size != (self.image_size, self.image_size):
            image = image.resize((self.image_size, self.image_size), self.resample)
        return np.asarray(image)

    def normalise(self, images: list[np.ndarray]) -> torch.Tensor:
        """Float32 [num_images, 3, image_size, image_size] from the results of `fit`."""
        shape = (len(images), self.image_size, self.image_size, 3)
        pixels = np.stack(images) if images else np.empty(shape, np.uint8)
        scale = (self.rescale_factor / np.array(self.std)).astype(np.float32)
        shift = (np.array(self.mean) / np.array(self.std)).astype(np.float32)
        return torch.from_numpy(pixels * scale - shift).permute(0, 3, 1, 2).contiguous()


def _read_settings(folder: Path) -> tuple[dict[str, Any], Path]:
    for name, key in zip(PROCESSOR_FILES, (None, "image_processor"), strict=True):
        path = folder / name
        if not path.is_file():
            continue
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
        settings = settings if key is None else settings.get(key)
        if isinstance(settings, dict):
            return settings, path
    raise ConfigError(
        f"'{folder}' has no preprocessor_config.json; set data.image_processor to the folder of "
        "the vision encoder's Hugging Face checkpoint"
    )
