"""Whether two models compute the same, whatever their weights do to rounding errors.

Outputs in FP32 that hardly differ agree. Those that differ may still come from the same function:
random or badly conditioned weights enlarge rounding errors without limit (in a sharp softmax the
last bit decides which key wins). Then both sides are computed in float64, where rounding errors are
9 digits smaller and a fault in the conversion is as large as before. And since a fault may be one
of precision alone, our error against float64 must be of the size of Hugging Face's.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_dattn.conversion.io.safetensors_reader import DTYPE_NAMES

logger = logging.getLogger(__name__)

DEFAULT_TOLERANCE = 1e-4
"""FP32 sums in another order through all layers."""
_EXACT_TOLERANCE = 1e-8
"""In float64: a norm with another epsilon differs by 1e-6, rounding by 1e-14 on good weights."""
_NOISE_RATIO = 10.0
"""Two orders of summation differ by a small factor, arithmetic in BF16 or TF32 by thousands."""


@dataclass(frozen=True)
class Pair:
    """One output of both sides, on the CPU."""

    what: str
    ours: Tensor
    theirs: Tensor
    tokens: tuple[int, ...] = ()
    """Where the logits are of generated tokens: those tokens, of which each knows the ones
    before it."""


@dataclass(frozen=True)
class Comparison:
    """How far one output of ours is from Hugging Face's."""

    what: str
    largest: float
    """Largest difference of two values, over the largest magnitude of Hugging Face's."""
    num_values: int
    rounded_to: str | None = None
    """The dtype, as safetensors calls it, to which Hugging Face's parameters were rounded."""
    exact: float | None = None
    """`largest` with both sides in float64; None where that was not needed."""
    our_error: float = 0.0
    """Of the first comparison's outputs against Hugging Face's in float64, root mean square."""
    their_error: float = 0.0

    def agrees(self, tolerance: float = DEFAULT_TOLERANCE) -> bool:
        """False for values that are not finite, too."""
        if self.largest <= tolerance:
            return True
        if self.exact is None:
            return False
        is_noise = self.our_error <= _NOISE_RATIO * self.their_error
        return self.exact <= _EXACT_TOLERANCE and is_noise


def judge(
    run: Callable[[str], list[Pair]],
    dtype: str,
    tolerance: float = DEFAULT_TOLERANCE,
    rounded_to: torch.dtype | None = None,
) -> list[Comparison]:
    """Compare both sides' outputs, in float64 too where they differ.

    Args:
        run: computes both sides in "fp32", "bf16" or "fp64".
        dtype: of the comparison.
        tolerance: of `Comparison.largest`, above which float64 decides.
        rounded_to: the dtype to which Hugging Face's parameters were rounded before.
    """
    pairs = run(dtype)
    found = [compare(pair.what, pair.ours, pair.theirs, rounded_to) for pair in pairs]
    far = [each for each in found if not each.largest <= tolerance]
    if not far:
        return found
    logger.info(
        "%s differs by %.2e in %s: both sides are computed once more, in float64, which tells "
        "whether that is rounding",
        far[0].what,
        far[0].largest,
        dtype,
    )
    exact = run("fp64")
    return [
        _in_float64(each, pair, other) if each in far else each
        for each, pair, other in zip(found, pairs, exact, strict=True)
    ]


def compare(
    what: str, ours: Tensor, theirs: Tensor, rounded_to: torch.dtype | None = None
) -> Comparison:
    """Largest difference relative to the largest value, any shape and dtype, in float64; not finite
    where a value is not."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    difference = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    name = None if rounded_to is None else DTYPE_NAMES[rounded_to]
    return Comparison(what, float(difference), theirs.numel(), name)


def _in_float64(found: Comparison, pair: Pair, exact: Pair) -> Comparison:
    alike = _num_alike(pair, exact)
    true = exact.theirs[:alike]
    return replace(
        found,
        exact=compare(exact.what, exact.ours, exact.theirs).largest,
        our_error=_error(pair.ours[:alike], true),
        their_error=_error(pair.theirs[:alike], true),
    )


def _num_alike(pair: Pair, exact: Pair) -> int:
    """How many logits are about the same text: one more than there are equal tokens in front."""
    if not pair.tokens:
        return len(pair.theirs)
    both = zip(pair.tokens, exact.tokens, strict=False)
    different = (number for number, (one, other) in enumerate(both) if one != other)
    shorter = min(len(pair.tokens), len(exact.tokens))
    return min(next(different, shorter) + 1, shorter)


def _error(values: Tensor, true: Tensor) -> float:
    error = (values.double() - true.double()).norm() / true.double().norm()
    return float(error) if torch.isfinite(error) else math.inf
