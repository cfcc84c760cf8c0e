"""Reading an image file, and what of it is only used after a conversion: several frames, four
colours, 16 bits per channel."""

from megatron_dattn.data.image_files import ImageRoot, read_image_file
from megatron_dattn.data.image_structure import (
    has_four_colours,
    has_sixteen_bits,
    is_animated,
    stated_size,
)
from megatron_dattn.data.policies import Fixes
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.errors import quoted

_CONVERSIONS = {
    Reason.ANIMATED_IMAGE: (is_animated, "has several frames"),
    Reason.CMYK_IMAGE: (has_four_colours, "has four colours (CMYK)"),
    Reason.SIXTEEN_BIT_IMAGE: (has_sixteen_bits, "has 16 bits per channel"),
}


def read_image(root: ImageRoot, path: str, fixes: Fixes) -> bytes:
    """The bytes of an image below `root` that may be used as it is, or converted.

    Raises:
        SampleError: as of `read_image_file`; the image is empty, or may not be converted.
        DataError: the system does not read it.
    """
    data = read_image_file(root, path)
    if not data or 0 in (stated_size(data) or ()):
        what = "no pixels" if data else "no bytes"
        raise SampleError(Reason.EMPTY_IMAGE, f"image {quoted(path)} has {what}")
    for reason in conversions(data):
        fixes.settle(reason, f"image {quoted(path)} {_CONVERSIONS[reason][1]}")
    return data


def conversions(data: bytes) -> list[Reason]:
    """The conversions that an image file needs, by the problem that asks for each."""
    return [reason for reason, (asks, _) in _CONVERSIONS.items() if asks(data)]
