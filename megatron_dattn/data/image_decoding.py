"""Opening images that nobody has checked.

Image files are untrusted input: formats are limited to JPEG, PNG, WEBP and GIF (others can start
external programs), sizes and what else makes work are read from the headers and refused before
anything is decoded, and truncated files are errors. Damaged notes beside sound pixels are not.
"""

import io
import re
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import (
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from megatron_dattn.data.image_structure import excess, has_late_notes, without_metadata
from megatron_dattn.data.rejection import Reason, SampleError

# Of Pillow's plugins these four, and what they import: it would look for a WEBP's among all.
_PLUGINS = (JpegImagePlugin, PngImagePlugin, WebPImagePlugin, GifImagePlugin)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
# What else is found under names of images, by its beginning.
_OTHERS = [
    (re.compile(magic, re.DOTALL | re.IGNORECASE), name)
    for magic, name in (
        (rb"\Z", "an empty file"),
        (rb".{4}ftyp(avif|avis)", "an AVIF image"),
        (rb".{4}ftyp(hei|hev|mif1|msf1)", "a HEIC image"),
        (rb".{4}ftyp|\x1a\x45\xdf\xa3|RIFF.{4}AVI ", "a video"),
        (rb"BM", "a BMP image"),
        (rb"II\*\0|MM\0\*", "a TIFF image"),
        (rb"\s*(<\?xml.{0,1000})?<svg", "an SVG drawing"),
        (rb"\s*<(!doctype|html|\?xml)", "a web page"),
        (rb"%PDF", "a PDF document"),
        (rb"\x1f\x8b|PK\x03\x04", "an archive"),
        (rb"\xff\xd8|\x89PNG|GIF8|RIFF.{4}WEBP", "an image with a damaged beginning"),
    )
]
MAX_SIDE = 16_384
_ORIENTATION = 0x0112  # EXIF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = tuple(_UPRIGHT[number] for number in (5, 6, 7, 8))  # whose sides change places
Read = TypeVar("Read")


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """An upright RGB image from the bytes of a file.

    Colours follow Hugging Face's processors: CMYK, palettes and grey are converted, transparency is
    dropped. 16-bit grey keeps its upper 8 bits; of an animation the first frame is taken.

    Raises:
        SampleError: the format is not allowed, size or structure are beyond the limits, the file is
            damaged.
        MemoryError: as it comes; it says nothing about the image.
    """
    return _judged(data, lambda kept: _as_rgb(_upright(_open(kept, max_pixels))))


def image_size(data: bytes, *, max_pixels: int) -> tuple[int, int]:
    """Width and height of what `decode_image` makes of a file, from its headers.

    Raises:
        SampleError, MemoryError: as `decode_image`, of what the headers tell.
    """

    def upright_size(kept: bytes) -> tuple[int, int]:
        image = _open(kept, max_pixels)
        if not has_late_notes(kept):
            # Pillow would decode a PNG without EXIF, to see whether some stands behind the pixels.
            image.info.setdefault("exif", None)
        method = _orientation(image)
        return image.size if method not in _LYING else image.size[::-1]

    return _judged(data, upright_size)


def _judged(data: bytes, read: Callable[[bytes], Read]) -> Read:
    """What is read from an image's bytes, with everything that can go wrong told apart."""
    # A process-wide switch that some libraries turn on; half an image is not a sample.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    if (too_much := excess(data)) is not None:
        raise SampleError(Reason.BROKEN_IMAGE, f"the image has {too_much}; save it anew")
    try:
        return _with_or_without_metadata(data, read)
    except (SampleError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise SampleError(Reason.HUGE_IMAGE, f"the image is too large: {error}") from error
    except Image.UnidentifiedImageError as error:
        kind = next((name for magic, name in _OTHERS if magic.match(data)), "not an image")
        raise SampleError(
            Reason.BROKEN_IMAGE, f"{kind}; only {', '.join(FORMATS)} are read"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and "out of memory" in str(error):  # as codecs put it
            raise MemoryError(str(error)) from error
        # Pillow's decoders raise whatever their parsers run into (struct.error, SyntaxError,
        # OverflowError, ...). Damaged bytes are the sample's fault, never a reason to stop.
        raise SampleError(
            Reason.BROKEN_IMAGE, f"the image is damaged: {type(error).__name__}: {error}"
        ) from error


def _with_or_without_metadata(data: bytes, read: Callable[[bytes], Read]) -> Read:
    """Read a file, and if that fails read what is left of it without metadata."""
    try:
        return read(data)
    except (SampleError, Image.DecompressionBombError, MemoryError):
        raise
    except Exception:
        pixels = without_metadata(data)
        if pixels is None or len(pixels) == len(data):
            raise
        return read(pixels)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    require_size(image.size, max_pixels)
    return image


def _upright(image: Image.Image) -> Image.Image:
    method = _orientation(image)
    return image if method is None else image.transpose(method)


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """The turn that EXIF asks for, where it says something that can be understood."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except MemoryError:
        raise
    except Exception:  # whatever the parser runs into: a note about the image, not the image
        return None
    return _UPRIGHT.get(orientation) if isinstance(orientation, int) else None


def require_size(size: tuple[int, int], max_pixels: int) -> None:
    """Raise SampleError for a width and height beyond the limits."""
    width, height = size
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise SampleError(
            Reason.HUGE_IMAGE,
            f"the image has {width}x{height} pixels; allowed are {max_pixels} pixels "
            f"(data.max_image_pixels) and sides up to {MAX_SIDE}",
        )


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey to 255 when it converts.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
