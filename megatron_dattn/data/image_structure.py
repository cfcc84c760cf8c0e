"""What the structure of an image file tells before anything is decoded: how much work it makes, and
which parts of it are the pixels.

Its size is one measure, and stands in the header. A file can also say little very often: a
progressive JPEG passes over all pixels once more with every scan, of which a few bytes make one,
and notes beside the pixels are read one by one. Image encoders make about ten scans, and some
hundred notes at the very most.
"""

import re
import struct
from collections.abc import Iterator
from itertools import dropwhile, islice

MAX_SCANS = 100
"""Of a JPEG. One costs 0.03 s where there are 16 million pixels."""
MAX_SEGMENTS = 500
"""Of a JPEG before its pixels: the largest colour profile has 255. Pillow's time grows with their
square."""
MAX_PARTS = 100_000
"""Chunks of a PNG, which are 8192 bytes as a rule, and blocks of a GIF before its first frame."""

_JPEG, _PNG, _GIF = b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"GIF8"
# Inside a scan, 0xff is followed by 0 or by a restart marker; a marker may be preceded by filling.
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_WITHOUT_LENGTH = (0x01, 0xD8)
_IMAGE_DESCRIPTOR, _EXTENSION = 0x2C, 0x21
# Size, palette, transparency, pixels, and EXIF for its rotation. Without an animation's own chunks
# a PNG is its first frame.
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")
_PNG_NOTES = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
_ADOBE = 0xEE  # APP14 says how colours are stored, which belongs to the pixels
_APPLICATION = range(0xE0, 0xF0)
_COMMENT = 0xFE
_WITH_LENGTH = range(0xC0, 0xFF)


def excess(data: bytes) -> str | None:
    """Name what an image file has too much of, if anything."""
    if data.startswith(_JPEG):
        return _jpeg_excess(data)
    parts = {_PNG: _png_chunks, _GIF: _gif_blocks}
    for beginning, places in parts.items():
        if data.startswith(beginning) and next(islice(places(data), MAX_PARTS, None), None):
            return f"more than {MAX_PARTS} parts"
    return None


def _jpeg_excess(data: bytes) -> str | None:
    segments = num_scans = 0
    for marker in _jpeg_markers(data):
        num_scans += marker == _START_OF_SCAN
        segments += num_scans == 0
        if segments > MAX_SEGMENTS:
            return f"more than {MAX_SEGMENTS} segments before its pixels"
        if num_scans > MAX_SCANS:
            return f"more than {MAX_SCANS} scans"
    return None


def _jpeg_markers(data: bytes) -> Iterator[int]:
    """The markers in their order, as libjpeg finds them: what lies between is skipped."""
    place = len(_JPEG)
    while found := _MARKER.search(data, place):
        marker, place = found[1][0], found.end()
        if marker == _END_OF_IMAGE:
            return
        yield marker
        if marker not in _WITHOUT_LENGTH:
            if place + 2 > len(data):
                return
            place += struct.unpack_from(">H", data, place)[0]


def _png_chunks(data: bytes) -> Iterator[int]:
    """Where each chunk starts."""
    place = len(_PNG)
    while place + 8 <= len(data):
        yield place
        place += 12 + struct.unpack_from(">I", data, place)[0]


def has_late_notes(data: bytes) -> bool:
    """True if there may be notes behind the pixels, where Pillow finds a PNG's only by decoding."""
    if not data.startswith(_PNG):
        return True
    kinds = (data[place + 4 : place + 8] for place in _png_chunks(data))
    behind = dropwhile(lambda kind: kind != b"IDAT", kinds)
    return any(kind in _PNG_NOTES for kind in behind)


def _gif_blocks(data: bytes) -> Iterator[int]:
    """Where each block before the first frame starts, be it inside another."""
    flags = data[10] if len(data) > 10 else 0
    place = 13 + (3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0)  # header and palette
    while place < len(data) and data[place] != _IMAGE_DESCRIPTOR:
        yield place
        place += 1
        if data[place - 1] != _EXTENSION:  # Pillow skips what it does not know
            continue
        place += 1
        while place < len(data) and data[place]:
            yield place
            place += 1 + data[place]
        place += 1


def without_metadata(data: bytes) -> bytes | None:
    """The pixels of a PNG or JPEG file as a file, or None if it is neither.

    For files that Pillow refuses because of their notes: it limits texts and colour profiles (a PNG
    with a long editing history is refused) and gives up where some notes beside the pixels are
    damaged. What is left suffices for the same pixels: colours that a profile would shift are not
    shifted by us anyway.

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
