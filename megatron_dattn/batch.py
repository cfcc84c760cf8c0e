"""One micro-batch, as all that handles it knows it: data loader, broadcast, model, loss."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.transfer import all_to_device, to_device

IGNORED_LABEL = -100
"""The label of text tokens that nothing is learned from; PyTorch's own `ignore_index`, and Hugging
Face's."""


def normalise_pixels(pixels: Tensor, scale: Tensor) -> Tensor:
    """Bytes as an encoder reads them: scaled, and shifted by the mean.

    Each of the two operations is rounded once, so the values are the same on every device.

    Args:
        pixels: uint8 [images, 3, height, width].
        scale: float32 [2, 3]: per channel the factor, and what is subtracted then.

    Returns:
        float32, shaped like the pixels.
    """
    factor, shift = scale.view(2, 3, 1, 1)
    return pixels * factor - shift


@dataclass
class PackedBatch:
    """One micro-batch: several samples in one flat pack of tokens (see TokenLayout)."""

    layout: TokenLayout
    input_ids: Tensor  # int64 [text_budget], padded with the pad id
    labels: Tensor  # int64 [text_budget]: the next text token if supervised, or IGNORED_LABEL
    # [num_images, 3, image_size, image_size]; num_images may be 0. uint8 as they are loaded, which
    # is a quarter of the float32 values that the model is given; see `normalised`.
    pixel_values: Tensor
    sample_keys: list[str]
    pixel_scale: Tensor | None = None  # float32 [2, 3], see `normalise_pixels`; None for floats
    labelled: Tensor | None = None  # int64 [labelled]: of `labelled_tokens`, kept by `to`
    # Of the whole pack, where the batch holds one context-parallel rank's images of it alone.
    whole: TokenLayout | None = None

    @property
    def num_samples(self) -> int:
        return self.layout.num_samples

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The batch with its tensors on a device, without waiting for it."""
        # How many labels there are is known on the host alone: a device would have to be asked.
        integers = [self.input_ids, self.labels, self.labelled_tokens()]
        scale = [] if self.pixel_scale is None else [self.pixel_scale]
        input_ids, labels, labelled, *scale = all_to_device([*integers, *scale], device)
        return replace(
            self,
            input_ids=input_ids,
            labels=labels,
            labelled=labelled,
            pixel_values=to_device(self.pixel_values, device),
            pixel_scale=scale[0] if scale else None,
        )

    def pin_memory(self) -> "PackedBatch":
        """Called by torch's DataLoader where there is a CUDA device."""
        # What else there is is so little that `to` copies it together first.
        return replace(self, pixel_values=self.pixel_values.pin_memory())

    def labelled_tokens(self) -> Tensor:
        """Text tokens that have a label, int64 [labelled], counted from the first text token."""
        if self.labelled is not None:
            return self.labelled
        return (self.labels != IGNORED_LABEL).nonzero().squeeze(1)

    def normalised(self) -> "PackedBatch":
        """The batch with float32 pixels, as the model takes them."""
        if self.pixel_scale is None:
            return self
        pixels = normalise_pixels(self.pixel_values, self.pixel_scale)
        return replace(self, pixel_values=pixels, pixel_scale=None)

    def without_pixels(self) -> "PackedBatch":
        """For the pipeline stages behind the vision encoder; the layout still knows the images."""
        pixels = self.pixel_values
        return replace(self, pixel_values=torch.empty(0, *pixels.shape[1:], dtype=pixels.dtype))
