"""The exported processor prepares images as training did."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, SiglipImageProcessorPil

from megatron_dattn.data.images import ImagePreprocessor
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


def as_everything(pixels, path):
    """The same RGB picture in every form that a processor is given."""
    Image.fromarray(pixels).save(path)
    first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return {
        "Pillow": Image.fromarray(pixels),
        "path": str(path),
        "Path": path,
        "array, channels last": pixels,
        "array, channels first": first,
        "array, not contiguous": first.transpose(1, 2, 0),
        "tensor, channels last": torch.from_numpy(pixels),
        "tensor, channels first": torch.from_numpy(first),
        "batch of one": torch.from_numpy(first)[None],
        "RGBA": np.concatenate([pixels, np.zeros_like(pixels[..., :1])], axis=-1),
    }


@pytest.mark.parametrize("fit", ["resize", "crop", "pad"])
def test_every_kind_of_image_gives_the_same_pixels(exported, tmp_path, fit):
    _, folder = exported("dattn")
    processor = DAttnProcessor.from_pretrained(folder)
    processor.image_fit = fit
    if fit == "crop":
        square = {"height": SIDE, "width": SIDE}
        changes = {"do_center_crop": True, "crop_size": square, "size": {"shortest_edge": SIDE}}
        settings = {**processor.image_processor.to_dict(), **changes}
        processor.image_processor = CLIPImageProcessorPil.from_dict(settings)
    pixels = np.random.default_rng(0).integers(0, 255, (20, 44, 3), dtype=np.uint8)
    ours = ImagePreprocessor(SIDE, image_fit=fit)
    expected = ours.normalise([ours.fit(encoded(Image.fromarray(pixels), "PNG"))])
    for kind, image in as_everything(pixels, tmp_path / "a.png").items():
        for given in (image, [image]):
            inputs = processor(text="<image>", images=given, return_tensors="pt")
            torch.testing.assert_close(
                inputs["pixel_values"], expected, atol=1e-6, rtol=0, msg=kind
            )


def test_grey_arrays_and_files_are_those_of_training(exported, tmp_path):
    _, folder = exported("dattn")
    processor = DAttnProcessor.from_pretrained(folder)
    ours = ImagePreprocessor(SIDE)
    grey = np.random.default_rng(0).integers(0, 255, (30, 24), dtype=np.uint8)
    for image in (grey, grey[None], torch.from_numpy(grey)[..., None]):
        pixels = processor(text="<image>", images=image, return_tensors="pt")["pixel_values"]
        expected = ours.normalise([ours.fit(encoded(Image.fromarray(grey), "PNG"))])
        torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)
    for number, data in enumerate(files()):  # 16-bit grey and a turned JPEG, by path
        path = tmp_path / str(number)
        path.write_bytes(data)
        pixels = processor(text="<image>", images=str(path), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(pixels, ours.normalise([ours.fit(data)]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((20, 44, 3), np.float32), "an image of float32: pass values from 0 to 255"),
        (torch.zeros(3, 20, 44), r"an image of torch\.float32: pass values from 0 to 255"),
        (torch.zeros(3, 20, 44, dtype=torch.bfloat16), r"an image of torch\.bfloat16"),
        (np.zeros((20, 44, 3), np.uint16), "an image of uint16"),
        (np.zeros((3, 44, 3), np.uint8), "may have its channels first or last"),
        (np.zeros((20, 44, 2), np.uint8), "has no axis of channels"),
        (np.zeros(9, np.uint8), "has no axis of channels"),
        (b"GIF89a", "an image of type bytes: pass a Pillow image"),
        ([None], "an image of type NoneType"),
    ],
)
def test_what_is_not_certainly_an_image_is_refused(exported, image, message):
    _, folder = exported("dattn")
    with pytest.raises(ValueError, match=message):
        DAttnProcessor.from_pretrained(folder)(text="<image>", images=image)


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
