"""An image in the middle of a square, at another size, without the square at its own size.

LLaVA-1.5 fills an image up to a square as wide as its longer side, and then makes that smaller. A
line of 16384 pixels would become a square of 1 GB on the way.
"""

from PIL import Image

_PIXELS_AT_A_TIME = 2**20


def padded_square(
    image: Image.Image, size: int, fill: tuple[int, int, int], resample: int
) -> Image.Image:
    """An RGB image, filled up to a square and resized to [size, size].

    Pillow resizes rows first and then the columns of the result, in bytes. Done apart, the pixels
    are the same to the bit, and the padding above and below is only ever `size` wide.
    """
    side = max(image.size)
    narrow = _resized_rows(image, side, size, fill, resample)
    column = Image.new("RGB", (size, side), fill)
    column.paste(narrow, (0, (side - image.height) // 2))
    return column.resize((size, size), resample)


def _resized_rows(
    image: Image.Image, side: int, size: int, fill: tuple[int, int, int], resample: int
) -> Image.Image:
    """Each row, filled up to `side` pixels, with `size` pixels; some rows at a time."""
    if image.width == side:
        return image.resize((size, image.height), resample)
    narrow = Image.new("RGB", (size, image.height))
    count = max(1, _PIXELS_AT_A_TIME // side)
    for top in range(0, image.height, count):
        bottom = min(top + count, image.height)
        rows = Image.new("RGB", (side, bottom - top), fill)
        rows.paste(image.crop((0, top, image.width, bottom)), ((side - image.width) // 2, 0))
        narrow.paste(rows.resize((size, bottom - top), resample), (0, top))
    return narrow
