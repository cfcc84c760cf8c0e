"""What of an image is used after a conversion only is read off its structure, as Pillow sees it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_dattn.data.image_conversions import conversions, read_image
from megatron_dattn.data.policies import Fixes
from megatron_dattn.data.rejection import Reason, SampleError
from tests.support.planted_defects import encoded, png

ALL = frozenset(Reason)
NOISE = Image.effect_noise((24, 17), 90).convert("RGB")
ANIMATED = {
    kind: encoded(NOISE, kind, save_all=True, append_images=[NOISE.rotate(180)])
    for kind in ("GIF", "PNG", "WEBP")
}
PLAIN = {kind: encoded(NOISE, kind) for kind in ("GIF", "PNG", "WEBP", "JPEG")}
CMYK = encoded(NOISE.convert("CMYK"), "JPEG")
DEEP = png(4, 4, 16, 2, bytes(24))


@pytest.mark.parametrize("kind", ANIMATED)
def test_several_frames(kind: str) -> None:
    assert conversions(ANIMATED[kind]) == [Reason.ANIMATED_IMAGE]


@pytest.mark.parametrize("kind", PLAIN)
def test_ordinary_images_need_none(kind: str) -> None:
    assert conversions(PLAIN[kind]) == []


def test_an_animation_of_one_frame_is_none() -> None:
    assert conversions(encoded(NOISE, "GIF", save_all=True, append_images=[])) == []
    assert conversions(encoded(NOISE.convert("P"), "GIF", comment=b"x" * 700)) == []


def test_colours_and_depths() -> None:
    assert conversions(CMYK) == [Reason.CMYK_IMAGE]
    assert conversions(encoded(NOISE, "JPEG", progressive=True, comment=b"y" * 9)) == []
    assert conversions(DEEP) == [Reason.SIXTEEN_BIT_IMAGE]
    assert conversions(png(4, 4, 16, 0, bytes(8))) == [Reason.SIXTEEN_BIT_IMAGE]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no bytes"),
        (png(0, 4, 8, 2, b""), "no pixels"),
        (png(4, 0, 8, 2, b""), "no pixels"),
        (b"GIF89a" + bytes(20), "no pixels"),
        (b"\xff\xd8\xff\xc0\0\x11\x08\0\0\0\x05\x03" + bytes(9), "no pixels"),
    ],
)
def test_empty_images_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(SampleError, match=words) as caught:
        read_image(str(tmp_path), "x", Fixes(ALL))
    assert caught.value.reason == Reason.EMPTY_IMAGE


def test_conversions_are_noted_or_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(CMYK)
    fixes = Fixes(ALL)
    assert read_image(str(tmp_path), "x", fixes) == CMYK
    assert fixes.made == {Reason.CMYK_IMAGE}
    with pytest.raises(SampleError, match="image 'x' has four colours") as caught:
        read_image(str(tmp_path), "x", Fixes(frozenset()))
    assert caught.value.reason == Reason.CMYK_IMAGE


@given(
    data=st.sampled_from([*ANIMATED.values(), *PLAIN.values(), CMYK, DEEP]),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8),
    end=st.integers(0, 3000),
)
def test_damaged_files_are_no_error(data: bytes, changes: list[tuple[int, int]], end: int) -> None:
    damaged = bytearray(data[:end])
    for place, value in changes:
        if place < len(damaged):
            damaged[place] = value
    assert set(conversions(bytes(damaged))) <= ALL
