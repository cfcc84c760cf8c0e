"""What a Hugging Face image processor's file says, in the terms of our `ImagePreprocessor`.

SigLIP's processors and CLIP's differ in how an image becomes a square, and in defaults. Settings
that would be ignored are refused: pixels that differ a little train a model that is a little wrong.
"""

from pathlib import Path
from typing import Any, Literal

from megatron_dattn.errors import ConfigError
from megatron_dattn.runtime.untrusted_file import JsonFields, read_json_object

ImageFit = Literal["resize", "pad", "crop", "anyres"]
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
_DEFAULTS = {"rescale_factor": 1 / 255, "resample": 3}
_WHITE = 255
# Normalised values between black and white: 2 in SigLIP, 4 in CLIP.
_MIN_CONTRAST, _MAX_CONTRAST = 0.1, 100.0
_LAST_RESAMPLE = 5


def read_image_settings(folder: Path, image_size: int) -> tuple[dict[str, Any], ImageFit]:
    """The settings in a folder, completed, and how they make an image a square.

    Args:
        image_size: side of the square that the model takes, in pixels.

    Raises:
        ConfigError: there are none, or they do something else.
    """
    settings, path = _read_file(folder)
    settings = _with_defaults(settings, path)
    fields = JsonFields(settings, str(path), ConfigError)
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if step in settings and not fields.flag(step):
            raise ConfigError(f"{path} switches {step} off, which the encoder needs")
    _check_values(fields)
    return settings, _image_fit(fields, image_size, path)


def _check_values(fields: JsonFields) -> None:
    """Refuse numbers with which the encoder would see no image.

    A standard deviation of 0 makes every pixel infinite, a tiny one drowns the image in its mean,
    and a factor of 0 makes all images black: all of them train without an error.

    Raises:
        ConfigError: naming the field.
    """
    factor = fields.number("rescale_factor")
    if factor <= 0:
        raise fields.wrong("rescale_factor", "above 0")
    means, deviations = fields.numbers("image_mean", 3), fields.numbers("image_std", 3)
    for mean, deviation in zip(means, deviations, strict=True):
        if deviation <= 0:
            raise fields.wrong("image_std", "above 0")
        contrast = _WHITE * factor / deviation
        if not _MIN_CONTRAST <= contrast <= _MAX_CONTRAST:
            raise ConfigError(
                f"{fields.where} has rescale_factor {factor:g} and image_std {deviation:g}: black "
                f"and white would be {contrast:.3g} apart, where encoders expect a few units"
            )
        if abs(mean / deviation) > _MAX_CONTRAST:
            raise fields.wrong("image_mean", "of the size of the pixels that it is taken from")
    if fields.whole("resample", least=0) > _LAST_RESAMPLE:
        raise fields.wrong("resample", f"one of Pillow's filters, 0 to {_LAST_RESAMPLE}")


def _with_defaults(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """An image processor's settings with those that it leaves out.

    Raises:
        ConfigError: it is of a kind that works in another way.
    """
    # The second name is that of files from before transformers 4.26.
    kind = str(settings.get("image_processor_type", settings.get("feature_extractor_type", "")))
    for name, defaults in _KINDS.items():
        if kind.startswith(name):
            return {**_DEFAULTS, **defaults, **settings}
    raise ConfigError(
        f"{path} describes '{kind}'; supported are image processors of SigLIP and of CLIP"
    )


def _image_fit(fields: JsonFields, image_size: int, path: Path) -> ImageFit:
    """How these settings make an image a square.

    Raises:
        ConfigError: they do not, or not one of the model's size.
    """
    # Newer versions of transformers write null for what is off.
    crops = fields.values["do_center_crop"] is not None and fields.flag("do_center_crop")
    size = _lengths(fields, "size", ("shortest_edge",) if crops else ("height", "width"))
    crop = _lengths(fields, "crop_size", ("height", "width")) if crops else None
    square = {"height": image_size, "width": image_size}
    if (not crops or crop == square) and size == square:
        return "resize"
    if crops and crop == square and size == {"shortest_edge": image_size}:
        return "crop"
    cut = f" and cuts out {crop}" if crops else ""
    raise ConfigError(
        f"{path} resizes to {size}{cut}, but the model's vision.image_size is {image_size}"
    )


def _lengths(fields: JsonFields, name: str, sides: tuple[str, ...]) -> dict[str, int]:
    """A size in pixels by side; files from before transformers 4.26 have one number for all."""
    value = fields.present(name)
    if not isinstance(value, dict):
        length = fields.whole(name, least=1)
        return dict.fromkeys(sides, length)
    lengths = JsonFields(value, f"{fields.where}: {name}", fields.error)
    return {side: lengths.whole(side, least=1) for side in value if value[side] is not None}


def _read_file(folder: Path) -> tuple[dict[str, Any], Path]:
    for name, key in zip(PROCESSOR_FILES, (None, "image_processor"), strict=True):
        path = folder / name
        try:
            settings = read_json_object(path, ConfigError)
        except FileNotFoundError:
            continue
        section = settings if key is None else settings.get(key)
        if isinstance(section, dict):
            return section, path
    raise ConfigError(
        f"'{folder}' has no preprocessor_config.json; set data.image_processor to the folder of "
        "the vision encoder's Hugging Face checkpoint"
    )
