"""Opening untrusted images."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from megatron_dattn.data.image_decoding import FORMATS, MAX_SIDE, decode_image
from megatron_dattn.data.image_structure import without_metadata
from megatron_dattn.data.rejection import Reason, SampleError

MAX_PIXELS = 40_000_000


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def noise(width: int = 13, height: int = 9, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    return decode_image(data, max_pixels=max_pixels)


def assert_refused(
    data: bytes, text: str, max_pixels: int = MAX_PIXELS, reason: Reason = Reason.BROKEN_IMAGE
) -> None:
    with pytest.raises(SampleError, match=text) as caught:
        decode(data, max_pixels)
    assert caught.value.reason == reason


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a few bytes of data."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(64)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", FORMATS)
def test_allowed_formats_open(format: str) -> None:
    assert decode(encoded(noise(), format)).size == (13, 9)


@pytest.mark.parametrize("format", ["BMP", "TIFF", "PPM", "ICO", "EPS"])
def test_other_formats_are_refused_whatever_their_name(format: str) -> None:
    assert_refused(encoded(noise(16, 16), format), "JPEG, PNG, WEBP, GIF")


def test_sizes_are_refused_from_the_header() -> None:
    # Decoding would fail on the missing data; the size is named instead, so nothing was decoded.
    for data, words, max_pixels in (
        (png_header(8000, 8000), "8000x8000", MAX_PIXELS),
        (png_header(60_000, 1), "60000x1", MAX_PIXELS),
        (png_header(MAX_SIDE + 1, 2), str(MAX_SIDE), MAX_PIXELS),
        (encoded(noise(10, 10)), "10x10", 99),
        (png_header(20_000, 20_000), "too large|20000x20000", MAX_PIXELS),
    ):
        assert_refused(data, words, max_pixels, Reason.HUGE_IMAGE)


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_files_are_refused_even_if_a_library_allows_them(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(noise(64, 64), format)
    for size in (len(data) // 2, len(data) * 9 // 10, 12, 0):
        assert_refused(data[:size], "damaged|not an image|empty file")


@settings(deadline=None)
@given(st.binary(max_size=64), st.integers(0, 2**32), st.sampled_from(FORMATS))
def test_damaged_bytes_give_an_image_or_a_sample_error(
    garbage: bytes, place: int, format: str
) -> None:
    data = bytearray(encoded(noise(24, 24), format))
    start = place % len(data)
    data[start : start + len(garbage)] = garbage
    try:
        image = decode(bytes(data))
    except SampleError:
        return
    assert image.mode == "RGB"


def test_exif_rotation_is_applied() -> None:
    image = noise(12, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    upright = decode(encoded(image, exif=exif))
    assert upright.size == (8, 12)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(image), k=-1))


def test_colour_modes_have_defined_results() -> None:
    grey = np.arange(96, dtype=np.uint8).reshape(8, 12)
    assert np.array_equal(
        np.asarray(decode(encoded(Image.fromarray(grey)))), np.stack([grey] * 3, axis=-1)
    )
    deep = (np.arange(96, dtype=np.uint16).reshape(8, 12) * 600).astype(np.uint16)
    assert np.array_equal(
        np.asarray(decode(encoded(Image.fromarray(deep))))[..., 0], (deep >> 8).astype(np.uint8)
    )
    palette = noise().quantize(16)
    assert np.array_equal(np.asarray(decode(encoded(palette))), np.asarray(palette.convert("RGB")))
    half_seen = decode(encoded(palette, transparency=3))
    assert np.array_equal(np.asarray(half_seen), np.asarray(palette.convert("RGB")))
    cmyk = noise(mode="CMYK")
    opened = Image.open(io.BytesIO(encoded(cmyk, "JPEG")))
    assert np.array_equal(
        np.asarray(decode(encoded(cmyk, "JPEG"))), np.asarray(opened.convert("RGB"))
    )


def test_transparency_is_dropped_as_hugging_face_does() -> None:
    image = noise(mode="RGBA")
    image.putalpha(0)
    assert np.array_equal(np.asarray(decode(encoded(image))), np.asarray(noise()))


@pytest.mark.parametrize("format", ["WEBP", "GIF", "PNG", "MPO"])
def test_of_an_animation_the_first_frame_is_taken(format: str) -> None:
    """Or of a stereo camera's pair of pictures; GIF has 256 colours, JPEG is not exact."""
    first, second = noise(mode="L").convert("RGB"), Image.new("RGB", (13, 9), "red")
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(first, format, save_all=True, append_images=[second], **options)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.n_frames == 2  # type: ignore[attr-defined]
    expected = decode(encoded(first, "JPEG")) if format == "MPO" else first
    assert np.array_equal(np.asarray(decode(data)), np.asarray(expected))


def with_chunk(data: bytes, kind: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk behind its first."""
    end_of_first = 8 + 25
    return data[:end_of_first] + chunk(kind, content) + data[end_of_first:]


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (b"zTXt", b"history\0\0" + zlib.compress(bytes(8_000_000))),
        (b"iTXt", b"history\0\1\0\0\0" + zlib.compress(bytes(8_000_000))),
        (b"iCCP", b"profile\0\0" + zlib.compress(bytes(8_000_000))),
        (b"zTXt", b"history\0\7damaged"),
        (b"pHYs", b"\1"),
        (b"acTL", b""),
    ],
    ids=["text", "unicode text", "profile", "unknown compression", "short", "animation"],
)
def test_a_png_is_not_lost_by_its_metadata(kind: bytes, content: bytes) -> None:
    sound = encoded(noise())
    assert np.array_equal(np.asarray(decode(with_chunk(sound, kind, content))), np.asarray(noise()))
    # What is damaged among the pixels stays an error.
    assert_refused(with_chunk(sound, kind, content)[:-40], "damaged")


def test_a_png_with_long_metadata_is_still_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    history = b"history\0\0" + zlib.compress(bytes(8_000_000))
    assert decode(with_chunk(encoded(noise(), exif=exif), b"zTXt", history)).size == (9, 13)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\1",
        # An orientation that is a text.
        b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\4\0\0\0top\0\0\0\0\0",
    ],
    ids=["no header", "offset beyond", "count beyond", "text"],
)
def test_an_image_is_not_lost_by_odd_exif(format: str, exif: bytes) -> None:
    image = noise(12, 8)
    found = decode(encoded(image, format, exif=exif))
    assert np.array_equal(np.asarray(found), np.asarray(decode(encoded(image, format))))


@pytest.mark.parametrize("orientation", range(10))
def test_orientations_are_pillow_s(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(), exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        expected = ImageOps.exif_transpose(opened)
    assert np.array_equal(np.asarray(decode(data)), np.asarray(expected))


@pytest.mark.parametrize("marker", [0xE1, 0xE2, 0xED, 0xFE])
def test_a_jpeg_without_its_notes_is_the_same(marker: int) -> None:
    for mode in ("RGB", "CMYK", "L"):
        sound = encoded(noise(mode=mode), "JPEG")
        note = struct.pack(">BBH", 0xFF, marker, 9) + b"garbage"
        stripped = without_metadata(sound[:2] + note + sound[2:])
        assert stripped is not None
        assert b"garbage" not in stripped
        assert np.array_equal(np.asarray(decode(stripped)), np.asarray(decode(sound)))
