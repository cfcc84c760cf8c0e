"""Damaged and odd image files, by name: what a data set of strangers holds, and worse."""

import os
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.unit.data.test_image_decoding import chunk, encoded, png_header

GOOD, BROKEN, MISSING = "good", "broken_image", "missing_image"
HUGE, EMPTY = "huge_image", "empty_image"
Case = tuple[str, bytes, set[str]]  # name, bytes, what may become of it
TRUNCATED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
PARTS = 20


def photo(width: int = 120, height: int = 90) -> Image.Image:
    """Smooth colours with a little noise, as cameras make them."""
    rows, columns = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    waves = np.stack((np.sin(columns / 9), np.cos(rows / 7), np.sin((rows + columns) / 11)), -1)
    return Image.fromarray((128 + 100 * waves + noise).clip(0, 255).astype(np.uint8))


def with_png_chunk(kind: bytes, content: bytes, *, late: bool = False) -> bytes:
    """A PNG with a chunk in front of its pixels, or behind them."""
    data = encoded(photo())
    place = -12 if late else 33
    return data[:place] + chunk(kind, content) + data[place:]


def with_exif(content: bytes) -> bytes:
    """A JPEG with these bytes as EXIF."""
    data = encoded(photo(), "JPEG")
    segment = b"Exif\0\0" + content
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def ifd(entries: list[tuple[int, int, int, int]], following: int = 0) -> bytes:
    """A TIFF directory behind its header: tag, type, count and value or offset each."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries))
    return head + body + struct.pack("<I", following)


def _bombs() -> Iterator[Case]:
    zeros = zlib.compress(bytes(200_000_000), 9)
    yield "bomb-pixels.png", png_header(60_000, 60_000), {HUGE}
    yield "bomb-side.png", png_header(16_385, 1), {HUGE}
    yield "bomb-iccp.png", with_png_chunk(b"iCCP", b"x\0\0" + zeros), {GOOD}
    yield "bomb-ztxt.png", with_png_chunk(b"zTXt", b"x\0\0" + zeros), {GOOD}
    yield "bomb-late-ztxt.png", with_png_chunk(b"zTXt", b"x\0\0" + zeros, late=True), {GOOD}
    yield "bomb-itxt.png", with_png_chunk(b"iTXt", b"x\0\1\0\0\0" + zeros), {GOOD}
    yield "text.png", with_png_chunk(b"tEXt", b"x\0" + b"y" * 5_000_000), {GOOD}
    # A row of zeros compresses well: a small file of many pixels, within the limits of a side.
    many = png_header(16_000, 16_000)[:33] + chunk(b"IDAT", zeros) + chunk(b"IEND", b"")
    yield "bomb-many.png", many, {HUGE}
    gif = b"GIF89a\1\0\1\0\0\0\0," + struct.pack("<HHHH", 0, 0, 65_535, 65_535) + b"\0\2\1\0\0;"
    yield "bomb.gif", gif, {HUGE}
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + b"\xfe\xff\xff" * 2
    yield "bomb.webp", b"RIFF" + struct.pack("<I", 4 + len(canvas)) + b"WEBP" + canvas, {HUGE}


def _notes() -> Iterator[Case]:
    yield "exif-loop.jpg", with_exif(ifd([(0x8769, 4, 1, 8)], following=8)), {GOOD}
    yield "exif-offset.jpg", with_exif(ifd([(0x0112, 3, 9, 0xFFFFFFF0)])), {GOOD}
    yield "exif-count.jpg", with_exif(ifd([(0x010E, 2, 0xFFFFFFFF, 8)])), {GOOD}
    yield "exif-type.jpg", with_exif(ifd([(0x0112, 99, 1, 6)])), {GOOD}
    yield "exif-short.jpg", with_exif(b"II*\0\xff"), {GOOD}
    yield "exif-entries.jpg", with_exif(b"II*\0\x08\0\0\0" + b"\xff" * 2_000), {GOOD}
    for orientation in range(10):
        note = ifd([(0x0112, 3, 1, orientation)])
        yield f"exif-{orientation}.jpg", with_exif(note), {GOOD}


def _truncated() -> Iterator[Case]:
    for format in TRUNCATED:
        data = encoded(photo(), format)
        for part in range(PARTS):
            name = f"cut-{part}.{format.lower()}"
            # A GIF may have all its pixels before its last bytes.
            fates = {BROKEN, GOOD} if format == "GIF" and part == PARTS - 1 else {BROKEN}
            fates = fates if part else {EMPTY}
            yield name, data[: len(data) * part // PARTS], fates


def _kinds() -> Iterator[Case]:
    image = photo()
    grey = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    frames: dict[str, Any] = {"save_all": True, "append_images": [image.rotate(90)]}
    cmyk = encoded(image.convert("CMYK"), "JPEG")
    yield "cmyk.jpg", cmyk, {GOOD}
    # Adobe's marker says how colours are stored in its last byte: 2 is YCCK.
    place = cmyk.index(b"Adobe") + 11
    yield "ycck.jpg", cmyk[:place] + b"\2" + cmyk[place + 1 :], {GOOD}
    yield "grey.jpg", encoded(image.convert("L"), "JPEG"), {GOOD}
    yield "deep.png", encoded(grey), {GOOD}
    yield "deep.tif", encoded(grey, "TIFF"), {BROKEN}
    yield "palette.png", encoded(image.convert("P"), transparency=3), {GOOD}
    yield "bits.png", encoded(image.convert("1")), {GOOD}
    yield "alpha.png", encoded(image.convert("RGBA")), {GOOD}
    for format in ("GIF", "WEBP", "PNG"):
        yield f"moves.{format.lower()}", encoded(image, format, **frames), {GOOD}
    yield "gif-named.jpg", encoded(image, "GIF"), {GOOD}
    yield "empty.png", b"", {EMPTY}
    yield "no-pixels.png", png_header(0, 0), {EMPTY}
    yield "heic.jpg", b"\0\0\0\x18ftypheic" + bytes(64), {BROKEN}
    yield "avif.jpg", encoded(image, "AVIF"), {BROKEN}
    yield "drawing.svg", b'<?xml version="1.0"?><svg><script/></svg>', {BROKEN}
    yield "script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", {BROKEN}
    yield "page.jpg", b"<!DOCTYPE html><html></html>", {BROKEN}


def odd_files() -> list[Case]:
    return [*_bombs(), *_notes(), *_truncated(), *_kinds()]


def write_odd_files(folder: Path) -> dict[str, set[str]]:
    """The files, and what else may stand where an image should, with what may become of each."""
    folder.mkdir(parents=True, exist_ok=True)
    fates = {}
    for name, data, expected in odd_files():
        (folder / name).write_bytes(data)
        fates[name] = expected
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "nowhere.png").symlink_to("none.png")
    # The path of a socket has 107 bytes at most.
    here, bound = os.getcwd(), socket.socket(socket.AF_UNIX)
    os.chdir(folder)
    bound.bind("socket.png")
    bound.close()
    os.chdir(here)
    others = ("folder.png", "pipe.png", "loop.png", "nowhere.png", "socket.png", "none.png")
    return {**fates, **{name: {MISSING} for name in others}}
