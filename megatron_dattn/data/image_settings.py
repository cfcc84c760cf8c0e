"""What a Hugging Face image processor's file says, in the terms of our `ImagePreprocessor`.

SigLIP's processors and CLIP's differ in how an image becomes a square, and in defaults. Settings
that would be ignored are refused: pixels that differ a little train a model that is a little wrong.
"""

import json
from pathlib import Path
from typing import Any, Literal

from megatron_dattn.errors import ConfigError

ImageFit = Literal["resize", "pad", "crop"]
# Where Hugging Face keeps an image processor's settings: the file of its own that older exports
# write, and the one that newer exports share with the text's.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# What settings leave out, by the beginning of the processor's class name: the defaults of Hugging
# Face's classes.
_KINDS: dict[str, dict[str, Any]] = {
    "SiglipImageProcessor": {
        "size": {"height": 224, "width": 224},
        "do_center_crop": False,
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
    },
    "CLIPImageProcessor": {
        "size": {"shortest_edge": 224},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711),
    },
}
_KINDS["CLIPFeatureExtractor"] = _KINDS["CLIPImageProcessor"]


def read_image_settings(folder: Path, image_size: int) -> tuple[dict[str, Any], ImageFit]:
    """The settings in a folder, completed, and how they make an image a square.

    Args:
        image_size: side of the square that the model takes, in pixels.

    Raises:
        ConfigError: there are none, or they do something else.
    """
    settings, path = _read_file(folder)
    settings = _with_defaults(settings, path)
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if settings.get(step, True) is False:
            raise ConfigError(f"{path} switches {step} off, which the encoder needs")
    return settings, _image_fit(settings, image_size, path)


def _with_defaults(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """An image processor's settings with those that it leaves out.

    Raises:
        ConfigError: it is of a kind that works in another way.
    """
    # The second name is that of files from before transformers 4.26.
    kind = str(settings.get("image_processor_type", settings.get("feature_extractor_type", "")))
    for name, defaults in _KINDS.items():
        if kind.startswith(name):
            return {**defaults, **settings}
    raise ConfigError(
        f"{path} describes '{kind}'; supported are image processors of SigLIP and of CLIP"
    )


def _image_fit(settings: dict[str, Any], image_size: int, path: Path) -> ImageFit:
    """How these settings make an image a square.

    Raises:
        ConfigError: they do not, or not one of the model's size.
    """
    size, crops, crop = settings["size"], settings["do_center_crop"], settings.get("crop_size")
    if isinstance(size, int):  # files from before transformers 4.26
        size = {"shortest_edge": size} if crops else {"height": size, "width": size}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    square = {"height": image_size, "width": image_size}
    if (not crops or crop == square) and size == square:
        return "resize"
    if crops and crop == square and size == {"shortest_edge": image_size}:
        return "crop"
    cut = f" and cuts out {crop}" if crops else ""
    raise ConfigError(
        f"{path} resizes to {size}{cut}, but the model's vision.image_size is {image_size}"
    )


def _read_file(folder: Path) -> tuple[dict[str, Any], Path]:
    for name, key in zip(PROCESSOR_FILES, (None, "image_processor"), strict=True):
        path = folder / name
        if not path.is_file():
            continue
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
        settings = settings if key is None else settings.get(key)
        if isinstance(settings, dict):
            return settings, path
    raise ConfigError(
        f"'{folder}' has no preprocessor_config.json; set data.image_processor to the folder of "
        "the vision encoder's Hugging Face checkpoint"
    )
