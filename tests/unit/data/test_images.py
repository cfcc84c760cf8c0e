"""SigLIP's and CLIP's preprocessing."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from megatron_dattn.batch import normalise_pixels
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.data.rejection import SampleError
from megatron_dattn.errors import ConfigError
from tests.unit.data.builders import save_processor
from tests.unit.data.test_image_decoding import MAX_PIXELS, encoded, noise


@pytest.mark.parametrize(("width", "height"), [(16, 16), (33, 20), (7, 50), (1, 1), (300, 200)])
def test_preprocessing_equals_hugging_face(tmp_path: Path, width: int, height: int) -> None:
    folder = save_processor(tmp_path / "processor")
    image = noise(width, height)
    ours = ImagePreprocessor.from_folder(str(folder), image_size=16, max_pixels=MAX_PIXELS)
    theirs = AutoImageProcessor.from_pretrained(folder, backend="pil")
    expected = theirs(images=image, return_tensors="pt")["pixel_values"]
    actual = ours.normalise([ours.squares(encoded(image))[0]])
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
    actual = ours.normalise([ours.squares(encoded(image))[0]])
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
        processor.squares(encoded(Image.new("RGB", (2000, 1))))


def test_padding_keeps_the_proportions() -> None:
    processor = ImagePreprocessor(image_size=16, image_fit="pad")
    pixels = processor.squares(encoded(Image.new("RGB", (16, 8), "red")))[0]
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
