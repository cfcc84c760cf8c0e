"""What the structure of an image file tells before anything is decoded: how much work it makes,
what its pixels are, and which parts of it they are. What cannot be followed says nothing here;
decoding says what is wrong with it.

Its size is one measure, and stands in the header. A file can also say little very often: a
progressive JPEG passes over all pixels once more with every scan, of which a few bytes make one,
and notes beside the pixels are read one by one. Image encoders make about ten scans, and some
hundred notes at the very most.
"""

import re
import struct
from collections.abc import Iterator
from itertools import dropwhile, islice, takewhile

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
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # but tables and a reserved one
_WITHOUT_LENGTH = (0x01, 0xD8)
_IMAGE_DESCRIPTOR, _EXTENSION, _TRAILER = 0x2C, 0x21, 0x3B
_WEBP_ANIMATION = 0x02
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
    parts: Iterator[object] = iter(())
    if data.startswith(_PNG):
        parts = _png_chunks(data)
    elif data.startswith(_GIF):
        parts = takewhile(lambda block: block != _IMAGE_DESCRIPTOR, _gif_blocks(data))
    too_many = next(islice(parts, MAX_PARTS, None), None) is not None
    return f"more than {MAX_PARTS} parts" if too_many else None


def stated_size(data: bytes) -> tuple[int, int] | None:
    """Width and height as the header has them; Pillow calls a file of none no image."""
    if data.startswith(_PNG) and len(data) >= 24:
        return struct.unpack_from(">II", data, 16)
    if data.startswith(_GIF) and len(data) >= 10:
        return struct.unpack_from("<HH", data, 6)
    frame = _jpeg_frame(data)
    return None if frame is None else frame[1::-1]


def is_animated(data: bytes) -> bool:
    """True if there are several frames, which Pillow would decode to count them."""
    if data.startswith(_GIF):
        blocks = islice(_gif_blocks(data), MAX_PARTS)
        frames = (block for block in blocks if block == _IMAGE_DESCRIPTOR)
        return next(islice(frames, 1, None), None) is not None
    if data.startswith(_PNG):
        header = takewhile(lambda chunk: chunk[0] != b"IDAT", islice(_png_chunks(data), MAX_PARTS))
        announced = (data[start + 8 : start + 12] for kind, start, _ in header if kind == b"acTL")
        return int.from_bytes(next(announced, b"")) > 1
    is_extended_webp = data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X"
    return is_extended_webp and len(data) > 20 and bool(data[20] & _WEBP_ANIMATION)


def has_four_colours(data: bytes) -> bool:
    """True for a JPEG in the colours of print."""
    frame = _jpeg_frame(data)
    return frame is not None and frame[2] == 4


def has_sixteen_bits(data: bytes) -> bool:
    """True for a PNG of 16 bits per channel."""
    return data.startswith(_PNG) and data[24:25] == b"\x10"


def _jpeg_excess(data: bytes) -> str | None:
    segments = num_scans = 0
    for marker, _ in _jpeg_markers(data):
        num_scans += marker == _START_OF_SCAN
        segments += num_scans == 0
        if segments > MAX_SEGMENTS:
            return f"more than {MAX_SEGMENTS} segments before its pixels"
        if num_scans > MAX_SCANS:
            return f"more than {MAX_SCANS} scans"
    return None


def _jpeg_frame(data: bytes) -> tuple[int, int, int] | None:
    """Height, width and number of components."""
    if not data.startswith(_JPEG):
        return None
    header = takewhile(lambda segment: segment[0] != _START_OF_SCAN, _jpeg_markers(data))
    start = next((place for marker, place in header if marker in _FRAMES), len(data))
    return struct.unpack_from(">HHB", data, start + 3) if start + 8 <= len(data) else None


def _jpeg_markers(data: bytes) -> Iterator[tuple[int, int]]:
    """The markers in their order, as libjpeg finds them, and what follows each: what lies between
    is skipped."""
    place = len(_JPEG)
    while found := _MARKER.search(data, place):
        marker, place = found[1][0], found.end()
        if marker == _END_OF_IMAGE:
            return
        yield marker, place
        if marker not in _WITHOUT_LENGTH:
            if place + 2 > len(data):
                return
            place += struct.unpack_from(">H", data, place)[0]


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of each chunk; the last one may end behind the data."""
    start = len(_PNG)
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length  # with the length itself, the name and the checksum
        yield kind, start, end
        start = end


def has_late_notes(data: bytes) -> bool:
    """True if there may be notes behind the pixels, where Pillow finds a PNG's only by decoding."""
    if not data.startswith(_PNG):
        return True
    behind = dropwhile(lambda chunk: chunk[0] != b"IDAT", _png_chunks(data))
    return any(kind in _PNG_NOTES for kind, _, _ in behind)


def _gif_blocks(data: bytes) -> Iterator[int]:
    """The kind of each block, and 0 for each that is inside another."""
    place = 13 + _palette(data, 10)
    while place < len(data) and (kind := data[place]) != _TRAILER:
        yield kind
        if kind == _IMAGE_DESCRIPTOR:
            place += 11 + _palette(data, place + 9)  # with the least code size
        elif kind == _EXTENSION:
            place += 2
        else:  # Pillow skips what it does not know
            place += 1
            continue
        while place < len(data) and data[place]:
            yield 0
            place += 1 + data[place]
        place += 1


def _palette(data: bytes, place: int) -> int:
    """Bytes of the palette that the flags at a place announce."""
    flags = data[place] if place < len(data) else 0
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


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
    kept = (
        data[start:end]
        for kind, start, end in _png_chunks(data)
        if kind in _PNG_PIXELS or end > len(data)
    )
    return b"".join((_PNG, *kept))


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
