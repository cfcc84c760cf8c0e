"""Opening images that nobody has checked.

Image files are untrusted input: formats are limited to JPEG, PNG, WEBP and GIF (others can start
external programs), sizes and what else makes work are read from the headers and refused before
anything is decoded, and truncated files are errors. Damaged notes beside sound pixels are not.
"""

import io

import numpy as np
from PIL import Image, ImageFile

from megatron_dattn.data.image_structure import excess, without_metadata
from megatron_dattn.data.rejection import Reason, SampleError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
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


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """An upright RGB image from the bytes of a file.

    Colours follow Hugging Face's processors: CMYK, palettes and grey are converted, transparency is
    dropped. 16-bit grey keeps its upper 8 bits; of an animation the first frame is taken.

    Raises:
        SampleError: the format is not allowed, size or structure are beyond the limits, the file is
            damaged.
        MemoryError: as it comes; it says nothing about the image.
    """
    # A process-wide switch that some libraries turn on; half an image is not a sample.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    if (too_much := excess(data)) is not None:
        raise SampleError(Reason.BROKEN_IMAGE, f"the image has {too_much}; save it anew")
    try:
        return _decode(data, max_pixels)
    except (SampleError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise SampleError(Reason.BROKEN_IMAGE, f"the image is too large: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise SampleError(
            Reason.BROKEN_IMAGE, f"not an image in one of the formats {', '.join(FORMATS)}"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and "out of memory" in str(error):  # as codecs put it
            raise MemoryError(str(error)) from error
        # Pillow's decoders raise whatever their parsers run into (struct.error, SyntaxError,
        # OverflowError, ...). Damaged bytes are the sample's fault, never a reason to stop.
        raise SampleError(
            Reason.BROKEN_IMAGE, f"the image is damaged: {type(error).__name__}: {error}"
        ) from error


def _decode(data: bytes, max_pixels: int) -> Image.Image:
    """Decode, and if that fails decode what is left without metadata."""
    try:
        return _decode_as_is(data, max_pixels)
    except (SampleError, Image.DecompressionBombError, MemoryError):
        raise
    except Exception:
        pixels = without_metadata(data)
        if pixels is None or len(pixels) == len(data):
            raise
        return _decode_as_is(pixels, max_pixels)


def _decode_as_is(data: bytes, max_pixels: int) -> Image.Image:
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image.size, max_pixels)
    return _as_rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says, where it says something that can be understood."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except MemoryError:
        raise
    except Exception:  # whatever the parser runs into: a note about the image, not the image
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


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
