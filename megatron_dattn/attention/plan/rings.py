"""Concentric rings of an image's patches, from the border to the centre.

Ring r of a grid of H x W patches holds those at distance r from the nearest border. A grid with an
odd shorter side has a line of patches, or a single one, in its centre.
"""

from megatron_dattn.attention.layout import ImageSpan, TokenRange


def image_rings(image: ImageSpan, start: int) -> list[list[TokenRange]]:
    """Packed tokens of each ring, outermost first, of the image whose first token is `start`."""
    height, width = image.grid
    rings = []
    for ring in range((min(height, width) + 1) // 2):
        first, last = ring, width - 1 - ring
        top, bottom = ring, height - 1 - ring
        ranges = [(top * width + first, top * width + last + 1)]
        for row in range(top + 1, bottom):
            ranges.append((row * width + first, row * width + first + 1))
            if last > first:
                ranges.append((row * width + last, row * width + last + 1))
        if bottom > top:
            ranges.append((bottom * width + first, bottom * width + last + 1))
        rings.append([(start + a, start + b) for a, b in ranges])
    return rings
