"""Tensors that a broken download has filled with zeros are named, not refused.

A file that was cut and preallocated has the right length and header, and zeros from somewhere on.
Zeros are numbers that a model may hold, in a gate that training has not opened yet say; half a
matrix of them in a trained model is a sign that its file is not whole.
"""

import logging
from dataclasses import dataclass, field

from torch import Tensor

logger = logging.getLogger(__name__)

_SHOWN = 5


@dataclass
class ZeroTensors:
    """Collects the names of those that are all zero, or whose second half is."""

    names: list[str] = field(default_factory=list)

    def add(self, name: str, tensor: Tensor) -> None:
        """Note a matrix that ends in zeros; biases and the weights of norms may be zero."""
        if tensor.ndim < 2 or tensor.numel() == 0 or tensor[-1].any():
            return  # nearly always: the last row alone is read
        if not tensor[len(tensor) // 2 :].any():
            self.names.append(name)

    def warn(self, where: str) -> None:
        """Name them in one warning, if there are any."""
        if not self.names:
            return
        more = len(self.names) - _SHOWN
        logger.warning(
            "%s: %s%s %s zero, or the second half of it is: if the model was trained, its download "
            "is broken; get it again",
            where,
            ", ".join(self.names[:_SHOWN]),
            f" and {more} more" if more > 0 else "",
            "is" if len(self.names) == 1 else "are",
        )
