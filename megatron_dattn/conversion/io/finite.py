"""NaN and infinite weights are refused where they are converted, by the tensor's name.

One of them makes every output NaN, in the middle of a training that began hours ago. The values are
looked at while they are in memory anyway: one pass over the converted parameter, and over the
originals only if that has found something.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_dattn.errors import CheckpointError


def check_finite(converted: Tensor, originals: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Refuse a parameter that holds NaN or infinite values.

    Args:
        converted: the parameter in the dtype in which it is stored.
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
    """Whether no value is NaN or infinite, in one pass and without a mask of the tensor's size."""
    if tensor.numel() == 0:
        return True
    return all(math.isfinite(float(end)) for end in torch.aminmax(tensor))
