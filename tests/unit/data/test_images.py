"""Opening untrusted images and SigLIP's preprocessing."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from transformers import AutoImageProcessor

from megatron_dattn.batch import normalise_pixels
from megatron_dattn.data.image_structure import without_metadata
from megatron_dattn.data.images import (
    FORMATS,
    MAX_SIDE,
    ImagePreprocessor,
    decode_image,
    read_image_file,
)
from megatron_dattn.data.missing import missing_image
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.errors import ConfigError
from tests.unit.data.builders import save_processor

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


def assert_refused(data: bytes, text: str, max_pixels: int = MAX_PIXELS) -> None:
    with pytest.raises(SampleError, match=text) as caught:
        decode(data, max_pixels)
    assert caught.value.reason == Reason.BROKEN_IMAGE


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
    assert_refused(png_header(8000, 8000), "8000x8000")
    assert_refused(png_header(60_000, 1), "60000x1")
    assert_refused(png_header(MAX_SIDE + 1, 2), str(MAX_SIDE))
    assert_refused(encoded(noise(10, 10)), "10x10", max_pixels=99)
    assert_refused(png_header(20_000, 20_000), "too large|20000x20000")


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_files_are_refused_even_if_a_library_allows_them(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(noise(64, 64), format)
    for size in (len(data) // 2, len(data) * 9 // 10, 12, 0):
        assert_refused(data[:size], "damaged|not an image")


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


def test_reading_stays_below_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (root / "sub" / "a.png").write_bytes(b"inside")
    assert read_image_file(str(root), "sub/a.png") == b"inside"
    assert read_image_file(str(root), "sub/../sub/a.png") == b"inside"
    outside = str(tmp_path / "secret.png")
    neighbour = str(tmp_path / "root-too" / "a.png")
    for path in ("../secret.png", "sub/../../secret.png", outside, neighbour, ".", "/"):
        with pytest.raises(SampleError, match="leaves its image root"):
            read_image_file(str(root), path)


@pytest.mark.parametrize(
    "path",
    ["\ud800", "../\ud800.png", "/\ud800", "a\0b", "../\0", "a/" * 2048, "../" + "a/" * 10**6],
)
def test_a_path_that_no_file_can_have_is_a_missing_image(tmp_path: Path, path: str) -> None:
    with pytest.raises(SampleError) as caught:
        read_image_file(str(tmp_path), path)
    assert caught.value.reason == Reason.MISSING_IMAGE
    assert missing_image({"image": path}, str(tmp_path)) == path


def test_a_name_that_is_no_text_is_read(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"d\xff.png")).write_bytes(b"image")
    name = json.loads(json.dumps(os.listdir(tmp_path)))[0]
    assert read_image_file(str(tmp_path), name) == b"image"


def test_absolute_paths_below_the_root_are_those_images(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.png").write_bytes(b"inside")
    (tmp_path / "link").symlink_to(root)
    inside = root / "sub" / "a.png"
    for folder, path in (
        (root, inside),
        (f"{root}/", inside),
        ("/", inside),
        ("/", str(inside)[1:]),
        (tmp_path / "link", inside),
        (root, tmp_path / "link" / "sub" / "a.png"),
        (root, root / "sub" / ".." / "sub" / "a.png"),
    ):
        assert read_image_file(str(folder), str(path)) == b"inside"


@pytest.mark.parametrize("path", ["data:image/png;base64,", "https://host/", "s3://bucket/"])
def test_addresses_are_refused_as_what_they_are(tmp_path: Path, path: str) -> None:
    with pytest.raises(SampleError, match="only files are read") as caught:
        read_image_file(str(tmp_path), path + "A" * 300_000)
    assert caught.value.reason == Reason.BAD_RECORD


def test_missing_and_odd_files_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for path in ("none.png", "pipe.png", "folder.png"):
        with pytest.raises(SampleError, match=path) as caught:
            read_image_file(str(tmp_path), path)
        assert caught.value.reason == Reason.MISSING_IMAGE


@pytest.mark.parametrize(("width", "height"), [(16, 16), (33, 20), (7, 50), (1, 1), (300, 200)])
def test_preprocessing_equals_hugging_face(tmp_path: Path, width: int, height: int) -> None:
    folder = save_processor(tmp_path / "processor")
    image = noise(width, height)
    ours = ImagePreprocessor.from_folder(str(folder), image_size=16, max_pixels=MAX_PIXELS)
    theirs = AutoImageProcessor.from_pretrained(folder, backend="pil")
    expected = theirs(images=image, return_tensors="pt")["pixel_values"]
    actual = ours.normalise([ours.fit(encoded(image))])
    assert actual.dtype == torch.float32
    # Both start from the same bytes; one rounding of float32 per step may differ.
    assert torch.allclose(actual, expected, rtol=0, atol=1e-6)


def save_clip_processor(folder: Path, **changes: object) -> Path:
    """As LLaVA-1.5's checkpoints have it, but for the size."""
    folder.mkdir()
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": True,
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **changes}))
    return folder


@pytest.mark.parametrize(
    ("width", "height"), [(16, 16), (33, 20), (7, 50), (17, 16), (1, 1), (3, 300), (300, 200)]
)
def test_clip_s_preprocessing_equals_hugging_face(tmp_path: Path, width: int, height: int) -> None:
    folder = save_clip_processor(tmp_path / "clip")
    image = noise(width, height)
    ours = ImagePreprocessor.from_folder(str(folder), image_size=16, max_pixels=MAX_PIXELS)
    theirs = AutoImageProcessor.from_pretrained(folder, backend="pil")
    expected = theirs(images=image, return_tensors="pt")["pixel_values"]
    # Both start from the same bytes; one rounding of float32 per step may differ.
    actual = ours.normalise([ours.fit(encoded(image))])
    assert torch.allclose(actual, expected, rtol=0, atol=1e-6)


def test_older_files_say_the_same(tmp_path: Path) -> None:
    folder = save_clip_processor(tmp_path / "new")
    new = ImagePreprocessor.from_folder(str(folder), image_size=16, max_pixels=MAX_PIXELS)
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "image_processor_type": None}
    folder = save_clip_processor(tmp_path / "old", **old, size=16, crop_size=16)
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    settings.pop("image_processor_type")
    path.write_text(json.dumps(settings))
    assert ImagePreprocessor.from_folder(str(folder), image_size=16, max_pixels=MAX_PIXELS) == new
    assert new.image_fit == "crop"


def test_the_run_may_choose_another_way_than_the_processor_s(tmp_path: Path) -> None:
    folder = str(save_clip_processor(tmp_path / "clip"))
    for fit in ("pad", "resize", "crop"):
        processor = ImagePreprocessor.from_folder(
            folder, image_size=16, image_fit=fit, max_pixels=MAX_PIXELS
        )
        assert processor.image_fit == fit


@pytest.mark.parametrize(
    "change",
    [{"do_center_crop": False}, {"crop_size": {"height": 14, "width": 16}}, {"size": 17}],
)
def test_a_clip_processor_that_makes_no_square_of_the_size_is_refused(
    tmp_path: Path, change: dict
) -> None:
    folder = save_clip_processor(tmp_path / "clip", **change)
    with pytest.raises(ConfigError, match="image_size is 16"):
        ImagePreprocessor.from_folder(str(folder), image_size=16, max_pixels=MAX_PIXELS)


def test_a_band_too_narrow_to_crop_is_a_sample_error() -> None:
    processor = ImagePreprocessor(image_size=16, image_fit="crop", max_pixels=20_000)
    with pytest.raises(SampleError, match="2000x1 pixels, too narrow"):
        processor.fit(encoded(Image.new("RGB", (2000, 1))))


def test_padding_keeps_the_proportions() -> None:
    processor = ImagePreprocessor(image_size=16, image_fit="pad")
    pixels = processor.fit(encoded(Image.new("RGB", (16, 8), "red")))
    assert (pixels[:3] == 127).all()
    assert (pixels[6:10] == (255, 0, 0)).all()
    assert (pixels[-3:] == 127).all()


def test_no_images_make_an_empty_tensor() -> None:
    assert ImagePreprocessor(image_size=16).normalise([]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"image_processor_type": "ViTImageProcessor"}, "'ViTImageProcessor'; supported"),
        ({"do_center_crop": True, "crop_size": {"height": 8, "width": 8}}, "and cuts out"),
        ({"do_normalize": False}, "do_normalize"),
        ({"size": {"height": 32, "width": 32}}, "image_size is 16"),
        ({"size": {"shortest_edge": 16}}, "image_size is 16"),
    ],
)
def test_processors_that_do_not_fit_are_refused(tmp_path: Path, change: dict, text: str) -> None:
    folder = save_processor(tmp_path / "processor")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=text):
        ImagePreprocessor.from_folder(str(folder), image_size=16, max_pixels=MAX_PIXELS)


def test_nested_and_missing_settings(tmp_path: Path) -> None:
    folder = save_processor(tmp_path / "processor")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"data\.image_processor"):
        ImagePreprocessor.from_folder(str(folder), image_size=16, max_pixels=MAX_PIXELS)
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    processor = ImagePreprocessor.from_folder(str(folder), image_size=16, max_pixels=MAX_PIXELS)
    assert processor.image_size == 16


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"do_normalize": 0}, "do_normalize 0, but it must be true or false"),
        ({"do_normalize": None}, "do_normalize null, but it must be true or false"),
        ({"do_rescale": "yes"}, 'do_rescale "yes", but it must be true or false'),
        ({"image_std": 0}, "image_std 0, but it must be 3 numbers"),
        ({"image_std": [0.5, 0.5]}, r"image_std \[0.5, 0.5\], but it must be 3 numbers"),
        ({"image_std": [0.5, 0.5, "0.5"]}, "image_std .*, but it must be 3 numbers"),
        ({"image_std": [0.5, 0.5, float("nan")]}, "image_std .*, but it must be 3 numbers"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std .*, but it must be above 0"),
        ({"image_std": [0.5, -0.5, 0.5]}, "image_std .*, but it must be above 0"),
        ({"image_std": [1e-9] * 3}, r"image_std 1e-09: black and white would be 1e\+09 apart"),
        ({"image_std": [1e9] * 3}, r"black and white would be 1e-09 apart"),
        ({"image_mean": "0.5"}, 'image_mean "0.5", but it must be 3 numbers'),
        ({"image_mean": [0.5, True, 0.5]}, "image_mean .*, but it must be 3 numbers"),
        ({"image_mean": [0.5, 1e6, 0.5]}, "image_mean .*, but it must be of the size"),
        ({"rescale_factor": 0}, "rescale_factor 0, but it must be above 0"),
        ({"rescale_factor": -1}, "rescale_factor -1, but it must be above 0"),
        ({"rescale_factor": float("nan")}, "rescale_factor NaN, but it must be a number"),
        ({"rescale_factor": None}, "rescale_factor null, but it must be a number"),
        ({"rescale_factor": "1/255"}, 'rescale_factor "1/255", but it must be a number'),
        ({"rescale_factor": 1e-6}, "rescale_factor 1e-06 and image_std"),
        ({"resample": 99}, "resample 99, but it must be one of Pillow's filters"),
        ({"resample": -1}, "resample -1"),
        ({"resample": "bicubic"}, 'resample "bicubic", but it must be a whole number'),
        ({"size": "16"}, 'size "16", but it must be a whole number'),
        ({"size": None}, "size null"),
        ({"size": True}, "size true"),
        ({"size": 0}, "size 0, but it must be a whole number of at least 1"),
        ({"size": {"height": "16", "width": 16}}, 'size has height "16"'),
        ({"size": {}}, "image_size is 16"),
        ({"do_center_crop": 1, "crop_size": 16}, "do_center_crop 1, but it must be true or false"),
        ({"do_center_crop": True, "crop_size": [16, 16]}, r"crop_size \[16, 16\]"),
    ],
)
def test_values_that_would_hide_the_image_are_refused_by_field(
    tmp_path: Path, change: dict, text: str
) -> None:
    folder = save_processor(tmp_path / "processor")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=text) as error:
        ImagePreprocessor.from_folder(str(folder), image_size=16, max_pixels=MAX_PIXELS)
    assert str(path) in str(error.value)


def test_null_is_what_newer_exports_write_for_off(tmp_path: Path) -> None:
    folder = save_processor(tmp_path / "processor")
    path = folder / "preprocessor_config.json"
    size = {"height": 16, "width": 16, "longest_edge": None, "shortest_edge": None}
    nulls = {"do_center_crop": None, "crop_size": None, "do_convert_rgb": None, "size": size}
    path.write_text(json.dumps({**json.loads(path.read_text()), **nulls}))
    processor = ImagePreprocessor.from_folder(str(folder), image_size=16, max_pixels=MAX_PIXELS)
    assert processor.image_fit == "resize"


@pytest.mark.parametrize(
    ("content", "text"),
    [("[" * 5000, "not valid JSON"), ("[]", "must hold a JSON object"), (None, "named pipe")],
)
def test_a_file_that_is_no_json(tmp_path: Path, content: str | None, text: str) -> None:
    path = tmp_path / "preprocessor_config.json"
    os.mkfifo(path) if content is None else path.write_text(content)
    with pytest.raises(ConfigError, match=text):
        ImagePreprocessor.from_folder(str(tmp_path), image_size=16, max_pixels=MAX_PIXELS)


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5,) * 3, (0.5,) * 3), (CLIP_MEAN, CLIP_STD)], ids=["siglip", "clip"]
)
def test_bytes_normalised_later_are_the_floats_of_numpy_to_the_bit(mean, std):
    """Every byte in every channel; a product and a difference, each rounded once."""
    preprocessor = ImagePreprocessor(image_size=16, mean=mean, std=std)
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    scale = (preprocessor.rescale_factor / np.array(std)).astype(np.float32)
    shift = (np.array(mean) / np.array(std)).astype(np.float32)
    expected = torch.from_numpy((image * scale - shift).transpose(2, 0, 1)[None])
    pixels = preprocessor.stack([image])
    assert pixels.dtype == torch.uint8
    found = normalise_pixels(pixels, preprocessor.pixel_scale)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(found, preprocessor.normalise([image]))
