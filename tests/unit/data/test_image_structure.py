"""Small image files that would make much work are refused before they are decoded."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_dattn.data.image_structure import MAX_PARTS, MAX_SCANS, MAX_SEGMENTS, excess
from megatron_dattn.data.images import ImagePreprocessor, padded_square
from tests.unit.data.test_image_decoding import assert_refused, chunk, decode, encoded, noise

PNG_HEAD = 33  # signature and size


def jpeg_with_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan, which refines some bits, is there again and again."""
    data = encoded(noise(40, 30), "JPEG", progressive=True)
    scans = data.count(b"\xff\xda")
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (count - scans) + data[-2:]


def jpeg_segments(count: int, kind: bytes = b"\xe5", content: bytes = b"") -> bytes:
    segment = b"\xff" + kind + struct.pack(">H", len(content) + 2) + content
    data = encoded(noise(), "JPEG")
    return data[:2] + segment * count + data[2:]


def png_chunks(count: int) -> bytes:
    data = encoded(noise())
    return data[:PNG_HEAD] + chunk(b"teXt", b"") * count + data[PNG_HEAD:]


def gif_blocks(block: bytes, count: int) -> bytes:
    data = encoded(noise(), "GIF")
    start = 13 + 3 * 2 ** ((data[10] & 7) + 1)  # header and palette
    return data[:start] + block * count + data[start:]


def test_scans_are_counted_before_they_are_decoded() -> None:
    assert decode(jpeg_with_scans(MAX_SCANS)).size == (40, 30)
    assert_refused(jpeg_with_scans(MAX_SCANS + 1), f"more than {MAX_SCANS} scans")


def test_filling_and_odd_notes_hide_no_scan() -> None:
    data = jpeg_with_scans(MAX_SCANS + 1)
    assert_refused(data.replace(b"\xff\xda", b"\xff\xff\xda"), "scans")
    for between in (
        b"\x00",
        b"\xff\xe5\x00\x02",
        b"\xff\x01",
        b"\xff\xd0",
        b"\xff\xfe\x00\x04\xff\xd9",
    ):
        assert excess(data.replace(b"\xff\xda", between + b"\xff\xda")) is not None


def test_what_looks_like_a_scan_in_a_note_is_none() -> None:
    data = jpeg_segments(3, content=b"\xff\xda\x00\x08" * 2000)
    assert decode(data).size == decode(encoded(noise(), "JPEG")).size


@pytest.mark.parametrize("kind", [b"\xe5", b"\xe1", b"\xfe"])
def test_segments_are_counted_before_they_are_read(kind: bytes) -> None:
    own = 10  # of any JPEG
    assert decode(jpeg_segments(MAX_SEGMENTS - own, kind, b"Exif\0\0x")).size == (13, 9)
    data = jpeg_segments(MAX_SEGMENTS, kind, b"Exif\0\0x")
    assert_refused(data, f"more than {MAX_SEGMENTS} segments")


def test_the_largest_colour_profile_is_no_excess() -> None:
    assert decode(jpeg_segments(255, b"\xe2", b"ICC_PROFILE\0" + bytes(5000))).size == (13, 9)


def test_parts_are_counted_before_they_are_read() -> None:
    few = MAX_PARTS // 100
    comment = b"\x21\xfe" + b"\x01a" * 9 + b"\x00"  # ten blocks
    for make in (
        png_chunks,
        lambda count: gif_blocks(b"\x21\xf9\x04\x00\x00\x00\x00\x00", count // 2),
        lambda count: gif_blocks(comment, count // 10),
        lambda count: gif_blocks(b"\x00", count),
    ):
        assert decode(make(few)).size == (13, 9)
        assert_refused(make(MAX_PARTS + 1000), f"more than {MAX_PARTS} parts")


@settings(deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "GIF", "WEBP"]),
    st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=4)), max_size=6),
)
def test_any_bytes_have_a_structure_or_none(format: str, changes: list[tuple[int, bytes]]) -> None:
    data = encoded(noise(), format)
    for place, content in changes:
        place %= len(data)
        data = data[:place] + content + data[place + len(content) :]
        assert excess(data) is None


def padded_at_full_size(
    image: Image.Image, size: int, fill: tuple[int, int, int], resample: int
) -> Image.Image:
    """LLaVA's expand2square, then a resize."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square if side == size else square.resize((size, size), resample)


@settings(deadline=None, max_examples=150)
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    size=st.integers(1, 64),
    fill=st.tuples(*[st.integers(0, 255)] * 3),
    resample=st.sampled_from(Image.Resampling),
    at_a_time=st.sampled_from([1, 500, 2**20]),
)
def test_padding_in_parts_is_padding_to_the_bit(
    width: int, height: int, size: int, fill: tuple, resample: int, at_a_time: int
) -> None:
    image = noise(width, height)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_dattn.data.images._PIXELS_AT_A_TIME", at_a_time)
        parts = padded_square(image, size, fill, resample)
    assert np.array_equal(parts, padded_at_full_size(image, size, fill, resample))


@pytest.mark.parametrize("shape", [(3000, 1), (1, 3000), (3000, 2000), (2000, 3000)])
def test_a_square_much_larger_than_the_image_is_padded_to_the_bit(shape: tuple[int, int]) -> None:
    image, fill = noise(*shape), (122, 116, 104)
    for resample in (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS):
        parts = padded_square(image, 384, fill, resample)
        assert np.array_equal(parts, padded_at_full_size(image, 384, fill, resample))


def test_no_image_is_ever_much_larger_than_the_file_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line becomes no square of its own length."""
    made, new = [], Image.new
    monkeypatch.setattr(
        Image, "new", lambda mode, size, *a: made.append(size) or new(mode, size, *a)
    )
    for shape in ((16_384, 1), (1, 16_384)):
        buffer = io.BytesIO()
        new("RGB", shape).save(buffer, "PNG")
        ImagePreprocessor(16, image_fit="pad").squares(buffer.getvalue())
    assert max(width * height for width, height in made) <= 2**20
