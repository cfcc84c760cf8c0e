"""The exported processor prepares images as training did."""

import io
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, SiglipImageProcessorPil

from megatron_dattn.conversion.hf_export.run import export_checkpoint
from megatron_dattn.conversion.hf_import.vlm_source import vlm_source
from megatron_dattn.data.conversation import parse_record
from megatron_dattn.data.encoder import SampleEncoder
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.hf.modeling_dattn import DAttnForConditionalGeneration
from megatron_dattn.hf.processing_dattn import DAttnProcessor
from megatron_dattn.inference import Prompt, encode_images, generate_tokens, load_model
from megatron_dattn.inference.image_cache import can_keep_images
from megatron_dattn.runtime.distributed import destroy_distributed
from tests.unit.hf.test_modeling_dattn import inputs_of

SIDE = 28
IMAGE_ID = 5  # `[control_8]` of the tiny tokenizer


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
    expected = ours.normalise([ours.squares(each)[0] for each in data])
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
    expected = ours.normalise([ours.squares(encoded(Image.fromarray(pixels), "PNG"))[0]])
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
        expected = ours.normalise([ours.squares(encoded(Image.fromarray(grey), "PNG"))[0]])
        torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)
    for number, data in enumerate(files()):  # 16-bit grey and a turned JPEG, by path
        path = tmp_path / str(number)
        path.write_bytes(data)
        pixels = processor(text="<image>", images=str(path), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(
            pixels, ours.normalise([ours.squares(data)[0]]), atol=1e-6, rtol=0
        )


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


@pytest.fixture(params=["dattn", "vidi", "dattn_biased", "dattn_sigmoid"])
def tiled(request, exported, tmp_path):
    """The two folders of a model that is given tiles; by case, other positions and encoders."""
    run, folder = exported(request.param)[0], tmp_path / "run"
    shutil.copytree(run, folder)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["data"] |= {"image_fit": "anyres", "image_grid_pinpoints": [[28, 56], [84, 28]]}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    export_checkpoint(folder, tmp_path / "export")
    yield folder, tmp_path / "export"
    destroy_distributed()


def test_tiles_give_the_generator_s_answers(tiled, tmp_path):
    run, folder = tiled
    sizes = {"wide.png": (80, 40), "tall.png": (30, 100)}  # three squares, and four
    for seed, (name, (width, height)) in enumerate(sizes.items()):
        pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    asked = [("why?", ["tall.png"]), ("what is this?", ["wide.png", "tall.png"]), ("what?", [])]
    loaded = load_model(run)
    prompts = [
        Prompt.from_question(loaded, question, [tmp_path / name for name in names])
        for question, names in asked
    ]
    expected = generate_tokens(loaded, prompts, max_new_tokens=8)
    model = DAttnForConditionalGeneration.from_pretrained(folder).eval()
    processor = DAttnProcessor.from_pretrained(folder)
    chats = [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "path": str(tmp_path / name)} for name in names),
                    {"type": "text", "text": question},
                ],
            }
        ]
        for question, names in asked
    ]
    for chat, prompt, answer in zip(chats, prompts, expected, strict=True):
        inputs = inputs_of(processor, [chat])
        is_text = inputs["input_ids"][0] != IMAGE_ID
        assert inputs["input_ids"][0][is_text].tolist() == prompt.tokens.input_ids
        assert tuple(is_text.cumsum(0)[~is_text].tolist()) == prompt.tokens.image_offsets
        if prompt.images:
            ours = loaded.preprocessor.normalise(prompt.pixels)
            torch.testing.assert_close(inputs["pixel_values"], ours, atol=1e-6, rtol=0)
        tokens = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        assert tokens.tolist() == answer
    # All prompts in one batch, whose images differ in number.
    together = inputs_of(processor, chats)
    tokens = model.generate(**together, max_new_tokens=8)[:, together["input_ids"].shape[1] :]
    for row, answer in zip(tokens.tolist(), expected, strict=True):
        assert row[: len(answer)] == answer
    # Images that are encoded once are read like files.
    if can_keep_images(loaded):
        kept = encode_images(loaded, [tmp_path / name for name in sizes])
        assert [len(image.squares) for image in kept] == [3, 4]
        again = Prompt.from_question(loaded, asked[1][0], kept)
        assert again.tokens == prompts[1].tokens
        assert generate_tokens(loaded, [again], max_new_tokens=8) == expected[1:2]


def test_tiles_are_counted_from_sizes_and_placed_in_every_text(tiled):
    processor = DAttnProcessor.from_pretrained(tiled[1])
    count = processor._get_num_multimodal_tokens([[40, 80], [100, 30]])
    assert count.num_image_tokens == [3, 4]
    image = Image.new("RGB", (80, 40))
    inputs = processor(text=["<image>a", "<image>b<image>"], images=[[image], [image, image]])
    assert [row.count(IMAGE_ID) for row in inputs["input_ids"]] == [3, 6]
    with pytest.raises(ValueError, match="has 2 <image> for 1 images"):
        processor(text="<image><image>", images=[image])


def test_the_way_of_making_tiles_is_imported_again(tiled):
    source = vlm_source(tiled[1], None)
    assert source.data == {"image_fit": "anyres", "image_grid_pinpoints": [[28, 56], [84, 28]]}


def frames_of_videos(folder, count):
    """Files of frames of different sizes."""
    for number in range(count):
        shape = (20 + number, 40 - number, 3)
        pixels = np.random.default_rng(number).integers(0, 255, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(count)]


VIDEOS = [
    ("<video>\nwhat?", [range(11)], []),
    ("<image>\nwhat?", [range(3)], []),  # LLaVA-Video's way
    ("<video>a<image><image>,<video>", [range(2), range(11)], [2, 3]),
    ("<image>\nand <video>", [range(9)], [0]),
    ("what is the tag <video>?", [], []),
]


@pytest.mark.parametrize(("question", "videos", "images"), VIDEOS)
@pytest.mark.parametrize("case", ["run", "tiled"])
def test_videos_are_those_of_training_s_packs(exported, tmp_path, case, question, videos, images):
    run, folder = exported("dattn")
    loaded = load_model(run)
    processor = DAttnProcessor.from_pretrained(folder)
    preprocessor = loaded.preprocessor
    if case == "tiled":
        grid = [[28, 56], [84, 28]]
        processor.image_fit, processor.image_grid_pinpoints = "anyres", grid
        preprocessor = ImagePreprocessor(SIDE, image_fit="anyres", image_grid_pinpoints=grid)
    names = frames_of_videos(tmp_path, 11)
    record = {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "so."}],
        "videos": [[names[number] for number in video] for video in videos],
        "image": [names[number] for number in images],
    }
    encoder = SampleEncoder(loaded.conversations, preprocessor, (2, 2), 10**4, 10**4)
    sample = encoder(parse_record(record), str(tmp_path))
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": "so."}]
    shown = {
        "videos": [[str(tmp_path / names[n]) for n in video] for video in videos] or None,
        "images": [Image.open(tmp_path / names[n]) for n in images] or None,
    }
    inputs = processor(
        text=processor.apply_chat_template(chat, tokenize=False), return_tensors="pt", **shown
    )
    ids = inputs["input_ids"][0]
    is_text = ids != IMAGE_ID
    assert ids[is_text].tolist() == sample.input_ids.tolist()
    assert tuple(is_text.cumsum(0)[~is_text].tolist()) == sample.image_offsets
    if sample.images:
        expected = preprocessor.normalise(sample.images)
        torch.testing.assert_close(inputs["pixel_values"], expected, atol=1e-6, rtol=0)
    destroy_distributed()


def test_videos_come_in_any_lists(exported):
    processor = DAttnProcessor.from_pretrained(exported("dattn")[1])
    one = [Image.new("RGB", (20, 44), colour) for colour in ("red", "blue")]
    as_array = np.stack([np.asarray(frame) for frame in one])
    alone = processor(text="<video>", videos=one, return_tensors="pt")
    for given in ([one], as_array, [as_array], torch.from_numpy(as_array), [[one]]):
        inputs = processor(text="<video>", videos=given, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], alone["pixel_values"])
        assert inputs["input_ids"].tolist() == [[IMAGE_ID, IMAGE_ID]]
    texts = ["<video>a", "<image>b<video>"]
    batch = processor(text=texts, images=[one[0]], videos=[[one], [one[:1]]])
    assert [row.count(IMAGE_ID) for row in batch["input_ids"]] == [2, 2]


@pytest.mark.parametrize(
    ("videos", "images", "message"),
    [
        ("a.mp4", None, "a video of type str: pass the list of its frames"),
        ([["a"], "b.mp4"], None, "a video of type str"),
        ([[Image.new("RGB", (9, 9))]] * 2, None, "the text has 1 <video> for 2 videos"),
        ([Image.new("RGB", (9, 9))], [Image.new("RGB", (9, 9))], "has 0 <image> for 1 images"),
    ],
)
def test_what_does_not_fit_the_places_of_videos_is_refused(exported, videos, images, message):
    processor = DAttnProcessor.from_pretrained(exported("dattn")[1])
    with pytest.raises(ValueError, match=message):
        processor(text="<video>", videos=videos, images=images)


def test_the_number_of_frames_is_exported_and_imported_again(exported, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(exported("dattn")[0], run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["video_frames"] = 3
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    export_checkpoint(run, tmp_path / "export")
    destroy_distributed()
    assert DAttnProcessor.from_pretrained(tmp_path / "export").video_frames == 3
    assert vlm_source(tmp_path / "export", None).data == {"image_fit": "resize", "video_frames": 3}
