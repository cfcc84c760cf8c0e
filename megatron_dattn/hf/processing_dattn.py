"""Prompts for the model: chat template, tokens with one `<image>` for each image, pixels.

This file travels with the exported weights.
"""

import os
import re
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from transformers import ProcessorMixin
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension, load_image
from transformers.processing_utils import MultiModalData

from .versions_dattn import check_transformers

check_transformers()

_CHANNELS = (1, 3, 4)
_VIDEO_TOKEN = "<video>"


class DAttnProcessor(ProcessorMixin):
    """A tokenizer and the encoder's image processor, SigLIP's or CLIP's.

    Texts are complete prompts, as the chat template writes them: no token is added. Batches are
    padded on the left, so that generation continues every prompt. Images are resized with Pillow
    as in training, whatever else is installed: Pillow images, paths, URLs, or arrays and tensors of
    uint8 with channels first or last. A video is the list of its frames, of which some are taken
    evenly; each becomes an image, without tiles, where `<video>` stands in the text. Where there
    are videos alone, `<image>` may stand for them.

    Args:
        image_fit: "resize" distorts an image to a square, "crop" cuts out its middle (the image
            processor says which), "pad" first fills it up to a square with the mean colour;
            "anyres" (LLaVA-NeXT) adds tiles of the distorted image's size, cut from one that keeps
            its proportions. Every tile has an `<image>` in the text, behind its image's own.
        image_grid_pinpoints: with "anyres", [height, width] of the resolutions to choose from.
        video_frames: how many of a video's frames are taken; all of a shorter one.
    """

    text_kwargs = {"padding_side": "left", "add_special_tokens": False}  # noqa: RUF012

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        image_fit: str = "resize",
        image_grid_pinpoints: list[list[int]] | None = None,
        video_frames: int = 8,
    ) -> None:
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.image_fit = image_fit
        self.image_grid_pinpoints = image_grid_pinpoints
        self.video_frames = video_frames
        super().__init__(_with_pillow(image_processor), tokenizer, chat_template=chat_template)

    def replace_image_token(
        self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any
    ) -> str:
        """One token marks an image's place, whatever its number of tokens.

        Args:
            **kwargs: settings of the image processor, which has checked them; some versions pass
                them on.
        """
        return self.image_token

    def _get_num_multimodal_tokens(
        self, image_sizes: list[list[int]] | None = None
    ) -> MultiModalData:
        counts = [1] * len(image_sizes or [])
        if self.image_fit == "anyres" and image_sizes:
            side = self.image_processor.size["height"]
            best = (self._resolution(*size) for size in image_sizes)
            counts = [1 + rows // side * (columns // side) for rows, columns in best]
        return MultiModalData(num_image_tokens=counts, num_image_patches=counts)

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As of every processor; images are prepared before the base class opens paths its way.

        Args:
            videos: one, a list of them, or a list of these for each text.

        Raises:
            ValueError: audio, which the base class would leave out in silence, or what is not
                certainly an image or the frames of a video; tiles or videos are given, and the text
                has another number of `<image>` or `<video>` than there are.
        """
        if audio is not None:
            raise ValueError("audio was given, but this model reads images, videos and text only")
        films = [] if videos is None else [self._frames(video) for video in _videos(videos)]
        images = None if images is None else self._prepared(images)
        tiled = self.image_fit == "anyres"
        if films or (images is not None and tiled):
            shown = _flat([] if images is None else images)
            squares = [self._tiled(image) if tiled else [image] for image in shown]
            text, images = self._with_places(text, squares, films)
        return super().__call__(images=images, text=text, **kwargs)

    def _frames(self, video: list[Any]) -> list[Image.Image]:
        """Frames of a video, the first and the last among them."""
        last, count = len(video) - 1, self.video_frames
        if last >= count:
            video = [video[number * last // max(count - 1, 1)] for number in range(count)]
        return [self._prepared(frame) for frame in video]

    def _with_places(
        self, text: Any, images: list[list[Image.Image]], videos: list[list[Image.Image]]
    ) -> tuple[Any, list[Image.Image]]:
        """The texts with an `<image>` for each square of an image and each frame of a video, and
        these in their order."""
        if text is None:
            return None, [square for some in (*images, *videos) for square in some]
        texts = [text] if isinstance(text, str) else text
        given = {self.image_token: images, _VIDEO_TOKEN: videos}
        if not videos:
            given = {self.image_token: images}  # a text may speak of the tag <video>
        elif not images and not any(_VIDEO_TOKEN in one for one in texts):
            given = {self.image_token: videos}
        for token, some in given.items():
            places = sum(one.count(token) for one in texts)
            if places != len(some):
                what = "images" if some is images else "videos"
                raise ValueError(f"the text has {places} {token} for {len(some)} {what}")
        left = {token: iter(some) for token, some in given.items()}
        squares: list[Image.Image] = []

        def places_of(found: re.Match[str]) -> str:
            some = next(left[found[0]])
            squares.extend(some)
            return self.image_token * len(some)

        pattern = "|".join(map(re.escape, given))
        texts = [re.sub(pattern, places_of, one) for one in texts]
        return (texts[0] if isinstance(text, str) else texts), squares

    def _tiled(self, image: Image.Image) -> list[Image.Image]:
        """The image, resized to the encoder's square, and its tiles row by row, as
        `LlavaNextImageProcessorPil` cuts them."""
        side, resample = self.image_processor.size["height"], self.image_processor.resample
        rows, columns = target = self._resolution(image.height, image.width)
        pixels = np.asarray(image)
        height, width = get_patch_output_size(pixels, target, ChannelDimension.LAST)
        canvas = Image.new("RGB", (columns, rows))
        inside = image.resize((width, height), resample)
        canvas.paste(inside, ((columns - width) // 2, (rows - height) // 2))
        tiles = [
            canvas.crop((left, top, left + side, top + side))
            for top in range(0, rows, side)
            for left in range(0, columns, side)
        ]
        return [image.resize((side, side), resample), *tiles]

    def _resolution(self, height: int, width: int) -> tuple[int, int]:
        best: tuple[int, int] = select_best_resolution(
            (height, width), self.image_grid_pinpoints or []
        )
        return best

    def _prepared(self, images: Any) -> Any:
        """Upright RGB images, one or lists of them; square ones if they are to be padded."""
        if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
            return [self._prepared(image) for image in images]
        image = ImageOps.exif_transpose(_as_pillow(images))
        if image.mode.startswith("I"):  # 16-bit grey keeps its upper 8 bits
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB")
        return self._padded(image) if self.image_fit == "pad" else image

    def _padded(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        fill = tuple(int(255 * value) for value in self.image_processor.image_mean)
        square = Image.new("RGB", (side, side), fill)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square


def _videos(given: Any) -> list[list[Any]]:
    """Videos as lists of frames in one list.

    Raises:
        ValueError: it is neither a list of frames nor one of videos.
    """
    if getattr(given, "ndim", 0) == 4:
        return [list(given)]
    if not isinstance(given, list | tuple):
        raise ValueError(f"a video of type {type(given).__name__}: pass the list of its frames")
    if given and not any(
        isinstance(each, list | tuple) or getattr(each, "ndim", 0) == 4 for each in given
    ):
        return [list(given)]
    return [video for some in given for video in _videos(some)]


def _flat(images: Any) -> list[Any]:
    """Images in one list, whatever lists they come in."""
    if not isinstance(images, list):
        return [images]
    return [image for some in images for image in _flat(some)]


def _as_pillow(image: Any) -> Image.Image:
    """Any kind of image as one that Pillow resizes.

    Raises:
        ValueError: it is of another kind, or an array whose values or axes are not certain.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | os.PathLike):
        # A file is opened here: transformers would clip 16-bit grey.
        return Image.open(image) if os.path.isfile(image) else load_image(str(image))
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy() if image.dtype == torch.uint8 else image
    elif not isinstance(image, np.ndarray):
        raise ValueError(
            f"an image of type {type(image).__name__}: pass a Pillow image, a path, a URL, or an "
            "array or tensor of uint8"
        )
    if image.dtype != np.uint8:
        raise ValueError(
            f"an image of {image.dtype}: pass values from 0 to 255 as uint8, or a Pillow image"
        )
    return Image.fromarray(_channels_last(image))


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    """[height, width, 3 or 4], or [height, width] of a grey image."""
    if pixels.ndim == 2:
        return pixels
    is_first, is_last = (pixels.ndim == 3 and pixels.shape[axis] in _CHANNELS for axis in (0, -1))
    if is_first == is_last:
        problem = "may have its channels first or last" if is_first else "has no axis of channels"
        raise ValueError(
            f"an image of shape {list(pixels.shape)} {problem}: pass a Pillow image, or 1, 3 or 4 "
            "channels as the first or the last axis"
        )
    pixels = np.moveaxis(pixels, 0, -1) if is_first else pixels
    return np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _with_pillow(image_processor: Any) -> Any:
    """The same image processor, on Pillow.

    Where torchvision is installed, transformers takes its resize for every processor that is not
    asked for by class, whatever type its file names, and its pixels differ from training's.
    """
    name = type(image_processor).__name__
    if name.endswith("Pil"):
        return image_processor
    on_pillow = getattr(transformers, f"{name.removesuffix('Fast')}Pil")
    return on_pillow.from_dict(image_processor.to_dict())
