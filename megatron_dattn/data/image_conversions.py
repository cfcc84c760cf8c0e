"""Reading an image file, and what of it is only used after a conversion: several frames, four
colours, 16 bits per channel.

All are read off the file's structure: Pillow would decode frames to answer. What cannot be followed
says nothing here; decoding says what is wrong with it.
"""

import re
import struct
from collections.abc import Iterator

from megatron_dattn.data.image_files import ImageRoot, read_image_file
from megatron_dattn.data.image_structure import MAX_PARTS
from megatron_dattn.data.policies import Fixes
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.errors import quoted

_JPEG, _PNG, _GIF = b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"GIF8"
_MARKER = re.compile(rb"\xff([^\x00\xff])")
# Start of frame: all of 0xc0 to 0xcf but tables and a reserved one. Start of scan ends the header.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN = 0xDA
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD9)))
_WEBP_ANIMATION = 0x02
_IMAGE_DESCRIPTOR, _EXTENSION = 0x2C, 0x21

_ABOUT = {
    Reason.ANIMATED_IMAGE: "has several frames",
    Reason.CMYK_IMAGE: "has four colours (CMYK)",
    Reason.SIXTEEN_BIT_IMAGE: "has 16 bits per channel",
}


def read_image(root: ImageRoot, path: str, fixes: Fixes) -> bytes:
    """The bytes of an image below `root` that may be used as it is, or converted.

    Raises:
        SampleError: as of `read_image_file`; the image is empty, or may not be converted.
        DataError: the system does not read it.
    """
    data = read_image_file(root, path)
    if not data or 0 in (_size(data) or ()):
        what = "no pixels" if data else "no bytes"
        raise SampleError(Reason.EMPTY_IMAGE, f"image {quoted(path)} has {what}")
    for reason in conversions(data):
        fixes.settle(reason, f"image {quoted(path)} {_ABOUT[reason]}")
    return data


def conversions(data: bytes) -> list[Reason]:
    """The conversions that an image file needs, by the problem that asks for each."""
    found = []
    if _is_animated(data):
        found.append(Reason.ANIMATED_IMAGE)
    if data.startswith(_JPEG) and (frame := _jpeg_frame(data)) is not None and frame[2] == 4:
        found.append(Reason.CMYK_IMAGE)
    if data.startswith(_PNG) and data[24:25] == b"\x10":
        found.append(Reason.SIXTEEN_BIT_IMAGE)
    return found


def _size(data: bytes) -> tuple[int, int] | None:
    """Width and height as the header has them."""
    if data.startswith(_PNG) and len(data) >= 24:
        return struct.unpack_from(">II", data, 16)
    if data.startswith(_GIF) and len(data) >= 10:
        return struct.unpack_from("<HH", data, 6)
    if data.startswith(_JPEG) and (frame := _jpeg_frame(data)) is not None:
        return frame[:2]
    return None


def _jpeg_frame(data: bytes) -> tuple[int, int, int] | None:
    """Width, height and number of components."""
    place = len(_JPEG)
    while (found := _MARKER.search(data, place)) and found[1][0] != _START_OF_SCAN:
        marker, place = found[1][0], found.end()
        if marker in _FRAMES and place + 8 <= len(data):
            height, width, components = struct.unpack_from(">HHB", data, place + 3)
            return width, height, components
        if marker not in _WITHOUT_LENGTH:
            if place + 2 > len(data):
                return None
            place += struct.unpack_from(">H", data, place)[0]
    return None


def _is_animated(data: bytes) -> bool:
    if data.startswith(_GIF):
        return sum(1 for _ in _gif_frames(data)) > 1
    if data.startswith(_PNG):
        return _png_frames(data) > 1
    is_extended_webp = data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X"
    return is_extended_webp and len(data) > 20 and bool(data[20] & _WEBP_ANIMATION)


def _png_frames(data: bytes) -> int:
    """Frames that the chunk before the pixels announces."""
    place = len(_PNG)
    for _ in range(MAX_PARTS):
        if place + 12 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"acTL":
            return struct.unpack_from(">I", data, place + 8)[0]
        if kind == b"IDAT":
            break
        place += 12 + length
    return 1


def _gif_frames(data: bytes) -> Iterator[int]:
    """Where the first two frames start."""
    place, frames = 13 + _palette(data, 10), 0
    blocks = 0
    while place < len(data) and frames < 2 and blocks < MAX_PARTS:
        kind = data[place]
        if kind == _IMAGE_DESCRIPTOR:
            yield place
            frames += 1
            place += 11 + _palette(data, place + 9)  # with the least code size
        elif kind == _EXTENSION:
            place += 2
        else:  # the end, or what is none
            return
        while place < len(data) and data[place] and blocks < MAX_PARTS:
            place, blocks = place + 1 + data[place], blocks + 1
        place += 1


def _palette(data: bytes, place: int) -> int:
    """Bytes of the palette that the flags at a place announce."""
    flags = data[place] if place < len(data) else 0
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0
