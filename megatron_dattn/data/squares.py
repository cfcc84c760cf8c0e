"""From what a conversation shows, images and videos below a folder, to squares for the encoder."""

import numpy as np

from megatron_dattn.data.image_conversions import read_image
from megatron_dattn.data.image_decoding import decode_image
from megatron_dattn.data.image_files import ImageRoot
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.data.policies import Fixes
from megatron_dattn.data.videos import Video, evenly, num_frames, read_frames


def may_be_several(image: str | Video, preprocessor: ImagePreprocessor) -> bool:
    """True if files must be looked at to know how many squares it becomes."""
    return isinstance(image, Video) or preprocessor.max_squares > 1


def count_squares(
    image: str | Video, root: ImageRoot, preprocessor: ImagePreprocessor, fixes: Fixes
) -> int:
    """Number of squares that `read_squares` returns; nothing is decoded. Raises as it does."""
    if not isinstance(image, Video):
        return preprocessor.num_squares(read_image(root, image, fixes))
    count, pixels = preprocessor.video_frames, preprocessor.max_pixels
    if image.is_file:
        return num_frames(root, image.paths[0], count, max_pixels=pixels)
    return len(evenly(len(image.paths), count))


def read_squares(
    image: str | Video, root: ImageRoot, preprocessor: ImagePreprocessor, fixes: Fixes
) -> list[np.ndarray]:
    """The squares of an image, or of the frames of a video, which have no tiles.

    Args:
        fixes: what may be converted, and what is.

    Returns:
        uint8 [image_size, image_size, 3] each.

    Raises:
        SampleError: a file cannot be used.
        DataError: the system does not read it.
        ConfigError: it is a video file, and PyAV is not installed.
    """
    if not isinstance(image, Video):
        return preprocessor.squares(read_image(root, image, fixes))
    count, pixels = preprocessor.video_frames, preprocessor.max_pixels
    if image.is_file:
        return read_frames(root, image.paths[0], count, preprocessor.square, max_pixels=pixels)
    chosen = (image.paths[number] for number in evenly(len(image.paths), count))
    return [
        preprocessor.square(decode_image(read_image(root, path, fixes), max_pixels=pixels))
        for path in chosen
    ]
