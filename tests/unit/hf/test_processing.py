"""The exported processor prepares images as training did."""

import importlib
import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, SiglipImageProcessorPil

from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.hf import configuration_dattn, processing_dattn
from megatron_dattn.hf.processing_dattn import DAttnProcessor

SIDE = 28


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def files():
    """A wide picture, one with a grey level of 16 bits, and one that lies on its side."""
    generator = np.random.default_rng(0)
    colours = Image.fromarray(generator.integers(0, 255, (20, 44, 3), dtype=np.uint8))
    grey = Image.fromarray(generator.integers(0, 65535, (30, 30), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    return [
        encoded(colours, "PNG"),
        encoded(grey, "PNG"),
        encoded(colours, "JPEG", exif=exif),
        encoded(colours.convert("P"), "PNG"),
    ]


@pytest.mark.parametrize("fit", ["resize", "pad"])
def test_pixels_are_those_of_training(exported, fit):
    _, folder = exported("dattn")
    processor = DAttnProcessor.from_pretrained(folder)
    processor.image_fit = fit
    ours = ImagePreprocessor(SIDE, image_fit=fit)
    data = files()
    images = [Image.open(io.BytesIO(each)) for each in data]
    text = "<image>" * len(images)
    pixels = processor(text=text, images=images, return_tensors="pt")["pixel_values"]
    expected = ours.normalise([ours.fit(each) for each in data])
    # Both resize bytes with Pillow; scaling in one step or in two differs by fp32 rounding.
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)


def test_text_is_a_complete_prompt(exported):
    _, folder = exported("dattn")
    processor = DAttnProcessor.from_pretrained(folder)
    inputs = processor(text=["<s>a b", "<s>a"], padding=True)
    assert [ids.count(1) for ids in inputs["input_ids"]] == [1, 1]
    assert inputs["attention_mask"] == [[1] * 4, [0, 0, 1, 1]]


def test_a_missing_image_is_refused(exported):
    _, folder = exported("dattn")
    with pytest.raises(ValueError, match="no images were passed"):
        DAttnProcessor.from_pretrained(folder)(text="<s><image>")


class SiglipImageProcessor:
    """Stands for torchvision's, which transformers hands over where torchvision is installed."""

    def __init__(self, settings):
        self.settings = settings

    def to_dict(self):
        return self.settings


def test_images_are_resized_with_pillow_even_where_torchvision_is_installed(exported):
    _, folder = exported("dattn")
    usual = DAttnProcessor.from_pretrained(folder)
    settings = {**usual.image_processor.to_dict(), "image_mean": [0.25] * 3}
    processor = DAttnProcessor(
        SiglipImageProcessor(settings), AutoTokenizer.from_pretrained(folder)
    )
    assert type(processor.image_processor) is SiglipImageProcessorPil
    image = Image.new("RGB", (20, 44), (255, 255, 255))
    pixels = processor(text="<image>", images=image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, torch.full((1, 3, SIDE, SIDE), 1.5))  # (1 - 0.25) / 0.5


@pytest.mark.parametrize("module", [configuration_dattn, processing_dattn])
def test_an_older_transformers_is_one_clear_error(monkeypatch, module):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "5.9.0")
    with pytest.raises(ImportError, match=r"transformers>=5\.10 is required"):
        importlib.reload(module)
