"""Prompts for the model: chat template, tokens with one `<image>` for each image, pixels.

This file travels with the exported weights.
"""

from typing import Any

import numpy as np
import transformers
from PIL import Image, ImageOps
from transformers import ProcessorMixin
from transformers.processing_utils import MultiModalData
from transformers.utils.versions import require_version

from .configuration_dattn import TRANSFORMERS_NEEDED

require_version(TRANSFORMERS_NEEDED)


class DAttnProcessor(ProcessorMixin):
    """A tokenizer and the encoder's image processor, SigLIP's or CLIP's.

    Texts are complete prompts, as the chat template writes them: no token is added. Batches are
    padded on the left, so that generation continues every prompt. Images are resized with Pillow
    as in training, whatever else is installed.

    Args:
        image_fit: "resize" distorts an image to a square, "crop" cuts out its middle (the image
            processor says which), "pad" first fills it up to a square with the mean colour.
    """

    text_kwargs = {"padding_side": "left", "add_special_tokens": False}  # noqa: RUF012

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        image_fit: str = "resize",
        **kwargs: Any,
    ) -> None:
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.image_fit = image_fit
        super().__init__(_with_pillow(image_processor), tokenizer, chat_template=chat_template)

    def replace_image_token(
        self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any
    ) -> str:
        """One token marks an image's place, whatever its number of rows."""
        return self.image_token

    def _get_num_multimodal_tokens(
        self, image_sizes: list[list[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        count = len(image_sizes or [])
        return MultiModalData(num_image_tokens=[1] * count, num_image_patches=[1] * count)

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        return super()._process_images(self._prepared(images), **kwargs)

    def _prepared(self, images: Any) -> Any:
        """Upright RGB images, one or lists of them; square ones if they are to be padded."""
        if isinstance(images, list | tuple):
            return [self._prepared(image) for image in images]
        if not isinstance(images, Image.Image):
            return images
        image = ImageOps.exif_transpose(images)
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
