"""Weights that a damaged file has filled with values no trained model has, named by their tensor.

NaN and infinite values are refused where they are converted: one of them makes every output NaN, in
the middle of a training that began hours ago. The values are looked at while they are in memory
anyway: one pass over the converted parameter, and over the originals only if that has found
something.

Zeros are warned of: a file that was cut and preallocated has the right length and header, and zeros
from somewhere on. A model may hold zeros, in a gate that training has not opened yet say; half a
matrix of them is a sign that the download is not whole.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_dattn.errors import CheckpointError

logger = logging.getLogger(__name__)

_SHOWN = 5


def check_finite(converted: Tensor, originals: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Refuse a parameter that holds NaN or infinite values.

    Args:
        converted: the parameter, any shape, in the dtype in which it is stored.
        originals: what it was made of, by name; read only if it is refused.
        where: the folder or checkpoint that holds those.

    Raises:
        CheckpointError: naming the original and the kind of value, or the value that the dtype
            cannot hold.
    """
    if is_finite(converted):
        return
    name, tensor = next((n, t) for n, t in originals if not is_finite(t.to(converted.dtype)))
    if is_finite(tensor):
        dtype = str(converted.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{where}: {name} has the value {float(tensor.abs().max()):.4g}, which {dtype} cannot "
            "hold; --dtype fp32 can, if it is meant"
        )
    kinds = {"NaN": int(tensor.isnan().sum()), "infinite": int(tensor.isinf().sum())}
    counts = " and ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    raise CheckpointError(
        f"{where}: {name} holds {counts} of {tensor.numel()} values: the model is damaged; "
        "download it again or take an earlier checkpoint"
    )


def is_finite(tensor: Tensor) -> bool:
    """True if no value is NaN or infinite, any shape and dtype; one pass, no mask of its size."""
    if tensor.numel() == 0:
        return True
    return all(math.isfinite(float(end)) for end in torch.aminmax(tensor))


@dataclass
class ZeroTensors:
    """Collects the names of those that are all zero, or whose second half is."""

    names: list[str] = field(default_factory=list)

    def add(self, name: str, tensor: Tensor) -> None:
        """Note a matrix [rows, ...], any dtype, that ends in zeros; biases and the weights of norms
        [rows] may be zero."""
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
