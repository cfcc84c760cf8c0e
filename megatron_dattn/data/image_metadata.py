"""Image files without their metadata, for those that Pillow refuses because of it.

Pillow limits texts and colour profiles (a PNG with a long editing history is refused) and gives up
where some notes beside the pixels are damaged. What is left here suffices for the same pixels:
colours that a profile would shift are not shifted by us anyway.
"""

import struct

_PNG = b"\x89PNG\r\n\x1a\n"
# Size, palette, transparency, pixels, and EXIF for its rotation. Without an animation's own chunks
# a PNG is its first frame.
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")
_JPEG = b"\xff\xd8"
_ADOBE = 0xEE  # APP14 says how colours are stored, which belongs to the pixels
_APPLICATION = range(0xE0, 0xF0)
_COMMENT, _START_OF_SCAN = 0xFE, 0xDA
_WITH_LENGTH = range(0xC0, 0xFF)


def without_metadata(data: bytes) -> bytes | None:
    """The pixels of a PNG or JPEG file as a file, or None if it is neither.

    Damage among the pixels stays as it is: from where the file cannot be followed, it is copied.
    """
    if data.startswith(_PNG):
        return _png_pixels(data)
    if data.startswith(_JPEG):
        return _jpeg_pixels(data)
    return None


def _png_pixels(data: bytes) -> bytes:
    kept, place = [_PNG], len(_PNG)
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length  # with the length itself, the name and the checksum
        if kind in _PNG_PIXELS or end > len(data):
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def _jpeg_pixels(data: bytes) -> bytes:
    kept, place = [_JPEG], len(_JPEG)
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = struct.unpack_from(">xBH", data, place)
        if marker == _START_OF_SCAN or marker not in _WITH_LENGTH:
            break
        end = place + 2 + length
        if marker == _ADOBE or not (marker in _APPLICATION or marker == _COMMENT):
            kept.append(data[place:end])
        place = end
    kept.append(data[place:])
    return b"".join(kept)
